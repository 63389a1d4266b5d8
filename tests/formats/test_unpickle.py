"""The pickle machine: it agrees with Python's own on harmless values, and runs nothing on the others."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import datetime
import os
import pathlib
import pickle
import pickletools
import signal
import struct
import subprocess
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool.errors import CheckpointError
from shardtool.formats import inert
from shardtool.formats.inert import DType, Global, Inert, plain
from shardtool.formats.unpickle import loads

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300)
keys = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(keys, inner, max_size=5)
        | st.sets(keys, max_size=5)
        | st.frozensets(keys, max_size=5)
        | st.binary(max_size=20).map(bytearray)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(values, st.sampled_from(PROTOCOLS))
def test_agrees_with_pickle(value: object, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol), "x") == value


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_value_or_a_checkpoint_error(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        loads(data, "x")


@settings(max_examples=200, deadline=None)
@given(values, st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_is_a_value_or_a_checkpoint_error(value: object, at: int, byte: int) -> None:
    data = bytearray(pickle.dumps({"a": value, "b": torch.float32, "c": argparse.Namespace(x=1)}, 4))
    data[at % len(data)] = byte
    with contextlib.suppress(CheckpointError):
        loads(bytes(data), "x")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_settings_hold(protocol: int) -> None:
    args = argparse.Namespace(
        lr=1e-4, params_dtype=torch.bfloat16, path=pathlib.PosixPath("/a/b"), sig=signal.SIGTERM,
        shape=torch.Size([2, 3]), device=torch.device("cuda", 1), when=datetime.timedelta(1),
        nested=types.SimpleNamespace(x=[1, (2, None)]), counts=collections.Counter("aab"),
        ordered=collections.OrderedDict(a=1), seed=np.int64(3), big=10**40, neg=-7, raw=b"\xff\x00",
    )  # fmt: skip
    made = plain(loads(pickle.dumps(args, protocol), "x"))
    assert made["lr"] == 1e-4 and made["params_dtype"] == "torch.bfloat16" and made["path"] == "/a/b"
    assert made["sig"] == "signal.Signals" and made["shape"] == (2, 3) and made["device"] == "cuda:1"
    assert made["nested"] == {"x": [1, (2, None)]} and made["ordered"] == {"a": 1} and made["raw"] == b"\xff\x00"
    assert made["counts"] == {"a": 2, "b": 1} and made["big"] == 10**40 and made["neg"] == -7
    assert "multiarray" in made["seed"]


def test_inert_objects_keep_their_state_and_class() -> None:
    data = (
        b"\x80\x02cmegatron.core.transformer.enums\nAttnBackend\nK\x05\x85R"  # an enum member by value
        b"."
    )
    made = loads(data, "x")
    assert isinstance(made, Inert) and made.args == (5,)
    assert plain(made) == "megatron.core.transformer.enums.AttnBackend"
    # a dict subclass of a module that is not here: state, items and entries
    data = b"\x80\x02cmegatron.nowhere\nThing\n)\x81}X\x01\x00\x00\x00aK\x01sb(K\x02K\x03eX\x01\x00\x00\x00kK\x04s."
    made = loads(data, "x")
    assert isinstance(made, Inert)
    assert (made.a, made.items, made.entries) == (1, [2, 3], {"k": 4})
    with pytest.raises(AttributeError):
        made.b  # noqa: B018


def test_enum_members_of_python_3_11_0() -> None:
    # getattr(class, name), as Python 3.11.0 to 3.11.3 pickle them; on anything else getattr is refused
    member = b"\x80\x02c__builtin__\ngetattr\ncmegatron.core.enums\nModelType\nX\x01\x00\x00\x00a\x86R."
    assert plain(loads(member, "x")) == "megatron.core.enums.ModelType"
    for owner in (b"c__builtin__\nset\n", b"c__builtin__\ngetattr\n", b"]", b"X\x01\x00\x00\x00a"):
        with pytest.raises(CheckpointError, match=r"builtins\.getattr"):
            loads(b"\x80\x02c__builtin__\ngetattr\n" + owner + b"X\x03\x00\x00\x00pop\x86R.", "x")


class Evil:
    def __init__(self, function: Any, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch canary",), "posix.system"),
        (subprocess.Popen, (["touch", "canary"],), ".Popen"),
        (builtins.eval, ("open('canary', 'w')",), "eval"),
        (builtins.exec, ("open('canary', 'w')",), "exec"),
        (builtins.__import__, ("antigravity",), "__import__"),
        (builtins.open, ("canary", "w"), "open"),
        (os.unlink, ("canary",), "posix.unlink"),
        (torch.load, ("canary",), "torch.serialization.load"),
        (torch.hub.load, ("a/b", "c"), "torch.hub.load"),
        (torch.storage._load_from_bytes, (b"",), "torch.storage._load_from_bytes"),
        (np.load, ("canary",), "numpy"),
        (pathlib.Path.cwd, (), "pathlib.Path"),
    ],
)
def test_code_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, args: tuple[object, ...], name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        loads(pickle.dumps({"args": Evil(function, *args)}, protocol), "common.pt")
    assert name in str(error.value) and "common.pt" in str(error.value)
    assert not (tmp_path / "canary").exists()
    assert error.value.hint


@pytest.mark.parametrize("module", ["posix", "os", "sys", "runpy", "importlib", "shutil", "ctypes", "megatronx.a"])
def test_modules_are_refused(module: str) -> None:
    for data in (f"\x80\x02c{module}\nf\n)R.".encode("latin1"), _stack_global(module, "f") + b")R."):
        with pytest.raises(CheckpointError, match=f"{module}.f"):
            loads(data, "x")


def _stack_global(module: str, name: str) -> bytes:
    def text(value: str) -> bytes:
        return b"\x8c" + bytes((len(value),)) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93"


def test_nothing_named_is_imported() -> None:
    import sys

    before = set(sys.modules)
    data = _stack_global("megatron.core.made.up", "Thing.os.system") + b"X\x01\x00\x00\x00a\x85R."
    made = loads(data, "x")
    assert isinstance(made, Inert) and made.kind == Global("megatron.core.made.up", "Thing.os.system")
    assert {name for name in set(sys.modules) - before if name.startswith("megatron")} == set()


HOSTILE = {
    "empty": b"",
    "no stop": b"\x80\x02N",
    "two values": b"\x80\x02NN.",
    "open mark": b"\x80\x02(N.",
    "protocol": b"\x80\x09N.",
    "old opcodes": b"(lp0\nI1\na.",
    "instance": b"\x80\x02(X\x01\x00\x00\x00ais\nf\n.",
    "persistent id": b"\x80\x02NQ.",
    "text persistent id": b"\x80\x02Pabc\n.",
    "extension": b"\x80\x02\x82\x01.",
    "unknown memo": b"\x80\x02h\x07.",
    "huge text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"\x80.",
    "call of a list": b"\x80\x02])R.",
    "call of a dtype": b"\x80\x02ctorch\nfloat32\n)R.",
    "call without a tuple": b"\x80\x02cmegatron.x\ny\nNR.",
    "state on a dtype": b"\x80\x02ctorch\nfloat32\n}b.",
    "state on a class": b"\x80\x02cargparse\nNamespace\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
    "append to a tuple": b"\x80\x02)K\x01a.",
    "item of a list": b"\x80\x02]K\x01K\x02s.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "deep key": b"\x80\x02}" + b")" + b"\x85" * 30_000 + b"K\x01s.",
    "deep set": b"\x80\x04\x8f(" + b")" + b"\x85" * 30_000 + b"\x90.",
    "tensor without storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89}tR.",
    "tuple of nothing": b"\x80\x02\x87.",
    "deep set in a call": b"\x80\x02c__builtin__\nset\n]" + b")" + b"\x85" * 1000 + b"a\x85R.",
    "bytes in a strange encoding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
    "reconstructed nothing": b"\x80\x02ccopy_reg\n_reconstructor\nNNN\x87R.",
    "tensor without a dtype": b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(NNNNNNNtR.",
    "subclass without arguments": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(NNNNtR.",
    "global without a name": b"\x80\x04NN\x93.",
    "bad utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "unordered pairs": b"\x80\x02ccollections\nOrderedDict\n]K\x01a\x85R.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(case: str) -> None:
    with pytest.raises(CheckpointError) as error:
        loads(HOSTILE[case], "the file")
    assert "the file" in str(error.value)


def test_a_huge_memo_index_costs_nothing() -> None:
    # Python's own unpickler allocates an array of that many entries
    assert loads(b"\x80\x02K\x07r\xff\xff\xff\xffj\xff\xff\xff\xff\x86.", "x") == (7, 7)


def test_deep_nesting_is_a_value_not_a_crash() -> None:
    made = loads(b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".", "x")
    assert isinstance(made, list)
    with pytest.raises(CheckpointError, match="nested beyond reason"):
        plain(made, "x")


def test_shared_lists_do_not_unfold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert, "MAX_SETTINGS", 1000)
    # 2**40 numbers, as a list of two references to a list of two references ...
    made: object = [1]
    for _ in range(40):
        made = [made, made]
    with pytest.raises(CheckpointError, match="nested beyond reason"):
        plain(loads(pickle.dumps(made, 2), "x"), "x")


def test_every_opcode_of_the_table_is_one_of_pickle() -> None:
    from shardtool.formats import unpickle

    known = {ord(op.code): op for op in pickletools.opcodes}
    left = {op.name for code, op in known.items() if code not in unpickle._TABLE and op.name != "STOP"}
    assert left == {
        "INT", "LONG", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING", "NEXT_BUFFER", "READONLY_BUFFER", "UNICODE",
        "FLOAT", "DUP", "PUT", "GET", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID",
    }  # fmt: skip


def test_dtypes_of_torch() -> None:
    for name in ("float32", "bfloat16", "float8_e4m3fn", "int64", "bool", "uint16"):
        assert loads(pickle.dumps(getattr(torch, name)), "x") == DType(name)


def test_the_rarer_opcodes() -> None:
    text = b"X\x01\x00\x00\x00a"
    assert loads(b"\x80\x02(" + text + b"K\x01d.", "x") == {"a": 1}  # DICT
    assert loads(b"\x80\x02(K\x01K\x02l.", "x") == [1, 2]  # LIST
    assert loads(b"\x80\x02K\x01K\x020.", "x") == 1  # POP
    assert loads(b"\x80\x02K\x01(0.", "x") == 1  # POP of a mark
    assert loads(b"\x80\x02K\x01(NN1.", "x") == 1  # POP_MARK
    made = loads(b"\x80\x04cmegatron.x\ny\n)}" + text + b"K\x01s\x92.", "x")  # NEWOBJ_EX
    assert isinstance(made, Inert) and made.a == 1 and repr(made) == "<inert megatron.x.y>"
    made = loads(b"\x80\x02cmegatron.x\ny\n)\x81}" + text + b"K\x01s}X\x01\x00\x00\x00bK\x02s\x86b.", "x")  # slots
    assert isinstance(made, Inert) and (made.a, made.b) == (1, 2)
    made = loads(b"\x80\x02ccopy_reg\n_reconstructor\ncmegatron.x\ny\nc__builtin__\nobject\nN\x87R.", "x")
    assert isinstance(made, Inert) and plain(made) == "megatron.x.y"
    assert plain(loads(b"\x80\x02ctorch\nstrided\n.", "x")) == "torch.strided"
    assert plain(bytearray(b"a")) == b"a"


def test_tensors_that_are_more_than_tensors(tmp_path: Path) -> None:
    from shardtool.formats import torch_zip
    from shardtool.formats.inert import TensorRef

    tensor = torch.ones(2)
    tensor.note = "kept as a Python attribute"  # type: ignore[attr-defined]
    torch.save({"attribute": tensor, "sparse": torch.eye(2).to_sparse()}, tmp_path / "x.pt")
    root = torch_zip.read(tmp_path / "x.pt").root
    assert isinstance(root, dict)
    assert isinstance(root["attribute"], TensorRef) and isinstance(root["sparse"], Inert)


@pytest.mark.parametrize(
    "saved",
    [
        b"X\x07\x00\x00\x00storage",
        b"(X\x06\x00\x00\x00modulectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x01t",
        b"(X\x07\x00\x00\x00storageNX\x01\x00\x00\x000NK\x01t",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NJ\xff\xff\xff\xfft",
    ],
)
def test_persistent_ids_that_are_no_storage(saved: bytes) -> None:
    with pytest.raises(CheckpointError, match="unknown"):
        loads(b"\x80\x02" + saved + b"Q.", "x", storages=True)
