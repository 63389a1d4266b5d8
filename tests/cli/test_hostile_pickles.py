"""Broken and hostile pickles: nothing executed, nothing imported. Among them is what scripts/fuzz has found."""

from __future__ import annotations

import copyreg
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fuzzing.mutations import _doubling as doubling
from spoiled import RANK_FILE, Copied, Megatron, Records, Refused, TinyModel, edit_rank, repack


def pickled(change: Callable[[bytes], bytes]) -> Callable[[Records], None]:
    def apply(records: Records) -> None:
        for number, (info, data) in enumerate(records):
            if info.filename.endswith("data.pkl"):
                records[number] = (info, change(data))

    return apply


def before_stop(added: bytes) -> Callable[[Records], None]:
    return pickled(lambda data: data[:-1] + added + b"0.")


def colliding(count: int) -> bytes:
    return b"}" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"Ns" for n in range(1, count))


def word(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> Callable[[Records], None]:
    return before_stop(name(module, attribute) + b"(" + b"".join(arguments) + b"tR")


def stored(kind: bytes, key: str = "0") -> bytes:
    """The persistent id of a storage with one element."""
    return b"(" + word("storage") + kind + word(key) + word("cpu") + b"K\x01tQ"


FLOATS = name("torch", "FloatStorage")
PICKLES: dict[str, tuple[Callable[[Records], object], str]] = {
    "an unknown persistent id": (before_stop(b"NQ"), "data.pkl"),
    "an import": (before_stop(b"cos\nsystem\n"), "os.system"),
    "a stacked import": (before_stop(b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93"), "os.system"),
    "an instance": (before_stop(b"(ios\nsystem\n"), "0x69"),
    "an object": (before_stop(b"(cos\nsystem\no"), "os.system"),
    "an extension": (before_stop(b"\x82\x01"), "0x82"),
    "a call with keywords": (before_stop(b"cos\nsystem\n)}\x92"), "os.system"),
    "a text persistent id": (before_stop(b"Pos.system\n"), "0x50"),
    "a dict without end": (before_stop(colliding(30_000)), "more than a file of its size"),
    "a million sets": (before_stop(b"(" + b"\x8f" * 1_000_000 + b"t"), "more than a file of its size"),
    "copies of a list": (
        before_stop(b"(" + b"N" * 100_000 + b"lq\xfa0(" + b"c__builtin__\nlist\nh\xfa\x85R" * 3000 + b"t"),
        "more than a file of its size",
    ),
    "a list that unfolds": (before_stop(b"ctorch\nSize\n" + doubling(45) + b"\x85R"), "size is"),
    "a call of nothing": (before_stop(b"N)R"), "is called"),
    "a call without arguments": (before_stop(name("torch", "Size") + b"NR"), "a call without arguments"),
    "a key that is a list": (before_stop(b"}]Ns"), "cannot be hashed"),
    "a size that is no list": (call("torch", "Size", b"N"), "size is None"),
    "a negative size": (call("torch", "Size", b"(J\xff\xff\xff\xffl"), "size is [-1]"),
    "a tensor without a storage": (call("torch._utils", "_rebuild_tensor_v2", b"NK\x00))"), "no storage"),
    "a tensor whose shape has no strides": (
        call("torch._utils", "_rebuild_tensor_v2", stored(FLOATS), b"K\x00K\x01\x85)"), "does not fit its strides"
    ),
    "a tensor without a dtype": (call("torch._utils", "_rebuild_tensor_v3", b"NNNNNNN"), "no dtype"),
    "a tensor subclass without arguments": (call("torch._tensor", "_rebuild_from_type_v2", b"NNNN"), "subclass"),
    "bytes in an unknown encoding": (call("_codecs", "encode", word("a"), word("utf16")), "encoding"),
    "a set of a number": (call("__builtin__", "set", b"K\x05"), "a set of things"),
    "a dict of numbers": (call("__builtin__", "dict", b"(K\x05l"), "something else than pairs"),
    "a getattr": (call("__builtin__", "getattr", b"N", word("a")), "getattr"),
    "an object without a class": (call("copyreg", "_reconstructor", b"N"), "without a class"),
    "a storage without a type": (before_stop(stored(b"N")), "an unknown storage"),
    "a storage with a long key": (before_stop(stored(FLOATS, "0" * 41)), "an unknown storage"),
    "two results": (pickled(lambda data: data[:-1] + b"N."), "before its value is complete"),
    "a word that is cut off": (before_stop(b"X\xff\xff\x00\x00"), "cut off"),
    "no end": (pickled(lambda data: data[:-1]), "cut off"),
    "a value that was not kept": (before_stop(b"j\xff\xff\xff\x7f"), "has not kept"),
    "a buffer from outside": (before_stop(b"\x97"), "0x97"),
    "another protocol inside": (before_stop(b"\x80\x00N"), "protocol"),
    "a text number": (before_stop(b"I1\n"), "0x49"),
    "an unknown protocol": (pickled(lambda data: b"\x80\x09" + data[2:]), "protocol"),
    "an item of no dict": (before_stop(b"NNNs"), "no dict"),
    "an item of no list": (before_stop(b"NNa"), "no list"),
    "an item of no set": (before_stop(b"N(N\x90"), "no set"),
    "an import without a name": (before_stop(b"NN\x93"), "without a name"),
    "the state of nothing": (before_stop(b"NNb"), "has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_with(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    change, name = PICKLES[case]
    repack(source / "release" / "mp_rank_00" / RANK_FILE, change)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, name))


def test_a_persistent_id_in_metadata(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist"))
    (source / "release" / ".metadata").write_bytes(b"\x80\x02NQ.")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(".metadata", "outside a torch file"))


def test_args_that_are_nested_a_hundred_times(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    nest: list[Any] = []
    for _ in range(100):
        nest = [nest]
    source = edit_rank(copied(megatron("llama")), lambda content: setattr(content["args"], "nest", nest))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "nested"))


def shell(canary: Path) -> bytes:
    return word(f"touch {canary}".ljust(200))  # errors name the byte, whatever the length of the path


SYSTEM, NAMESPACE = b"cos\nsystem\n", b"cargparse\nNamespace\n)\x81"


def method(attribute: str, then: bytes) -> Callable[[Path], bytes]:
    """An object whose own `attribute` is os.system, which an opcode then calls."""
    return lambda canary: NAMESPACE + b"}" + word(attribute) + SYSTEM + b"sb" + then.replace(b"TEXT", shell(canary))


# How a pickle can import or call: what runs a command in Python's own unpickler, and what is said of it here
CODE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "GLOBAL and REDUCE": (lambda c: SYSTEM + shell(c) + b"\x85R", "os.system"),
    "STACK_GLOBAL and REDUCE": (lambda c: word("os") + word("system") + b"\x93" + shell(c) + b"\x85R", "os.system"),
    "a name of several parts": (
        lambda c: word("shutil") + word("os.system") + b"\x93" + shell(c) + b"\x85R", "shutil.os.system"
    ),
    "INST": (lambda c: b"(" + shell(c) + b"ios\nsystem\n", "0x69"),
    "OBJ": (lambda c: b"(" + SYSTEM + shell(c) + b"o", "os.system"),
    "NEWOBJ": (lambda c: b"csubprocess\nPopen\n" + b"(" + word("touch") + word(str(c)) + b"l\x85\x81", "subprocess.Popen"),
    "NEWOBJ_EX": (lambda c: b"csubprocess\nPopen\n" + b"(" + word("touch") + word(str(c)) + b"l\x85}\x92", "Popen"),
    "EXT1": (lambda c: b"\x82\xf0" + shell(c) + b"\x85R", "0x82"),
    "EXT2": (lambda c: b"\x83\xf0\x00" + shell(c) + b"\x85R", "0x83"),
    "EXT4": (lambda c: b"\x84\xf0\x00\x00\x00" + shell(c) + b"\x85R", "0x84"),
    "BUILD": (method("__setstate__", b"TEXTb"), "os.system"),
    "APPEND": (method("append", b"TEXTa"), "os.system"),
    "APPENDS": (method("extend", b"(TEXTe"), "os.system"),
    "ADDITEMS": (method("add", b"(TEXT\x90"), "os.system"),
    "PERSID": (lambda _: b"Pos.system\n", "0x50"),
    "BINPERSID": (lambda _: word("os.system") + b"Q", "persistent id"),
}  # fmt: skip
NOT_RUN_BY_PYTHON = (
    "NEWOBJ",
    "NEWOBJ_EX",
    "APPENDS",
    "PERSID",
    "BINPERSID",
)  # they need a class, a list, a reader's help


@pytest.mark.parametrize("case", CODE)
def test_code_in_metadata_and_common_pt_with(
    case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    """Before a file that is in order otherwise."""
    canary = tmp_path / "executed"
    code, said = CODE[case][0](canary), CODE[case][1]
    if case not in NOT_RUN_BY_PYTHON:
        copyreg.add_extension("os", "system", 0xF0)
        pickle.loads(b"\x80\x04" + code + b".")
        copyreg.remove_extension("os", "system", 0xF0)
        assert canary.exists(), "this code does nothing, so the test shows nothing"
        canary.unlink()
    source = copied(megatron("llama", "torch_dist"))
    paths = [source / "release" / name for name in ("common.pt", ".metadata")]
    good = [path.read_bytes() for path in paths]
    paths[1].write_bytes(b"\x80\x04" + code + b"0" + good[1])
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(paths[1], said))
    paths[1].write_bytes(good[1])
    repack(paths[0], pickled(lambda data: b"\x80\x04" + code + b"0" + data))
    for arguments in (("megatron2hf", source, tmp_path / "dst"), ("inspect", source)):
        refused(1, *arguments, names=(paths[0], said))
    assert not canary.exists()


class Malicious:
    """Pickles to a call of os.system, which leaves a file behind if anybody makes it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("case", ["common.pt", ".metadata", RANK_FILE, "pytorch_model.bin"])
def test_code_in(
    case: str, tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    canary = tmp_path / "executed"
    if case == "pytorch_model.bin":
        source = copied(tiny_model("llama"))
        tensors = load_file(source / "model.safetensors")
        (source / "model.safetensors").unlink()
        torch.save({**tensors, "evil": Malicious(canary)}, source / case)
        convert_it: tuple[object, ...] = ("hf2megatron", source, tmp_path / "dst")
    else:
        source = copied(megatron("llama", "torch" if case == RANK_FILE else "torch_dist", "te", 1, 1))
        convert_it = ("megatron2hf", source, tmp_path / "dst")
        if case == ".metadata":
            metadata = pickle.loads((source / "release" / case).read_bytes())
            metadata.planner_data = Malicious(canary)
            (source / "release" / case).write_bytes(pickle.dumps(metadata))
        else:
            (path,) = source.glob(f"release/**/{case}")
            content = torch.load(path, weights_only=False)
            content["args"].evil = Malicious(canary)
            torch.save(content, path)
    judged = ("verify", tiny_model("llama"), source)
    for arguments in (convert_it, ("inspect", source), judged, (*judged, "--level", "logits")):
        refused(1, *arguments, names=("system", case))
    assert not canary.exists()
