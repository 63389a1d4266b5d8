"""Broken and hostile torch archives and pickles: nothing executed. Among them is what scripts/fuzz has found."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fuzzing.mutations import _doubling as doubling
from spoiled import RANK_FILE, Copied, Megatron, Refused, TinyModel

Records = list[tuple[zipfile.ZipInfo, bytes]]


def repack(path: Path, change: Callable[[Records], object], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(info, archive.read(info)) for info in archive.infolist()]
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for info, data in records:
            archive.writestr(info.filename, data)


def resize(records: Records) -> None:
    at = next(number for number, (info, _) in enumerate(records) if info.filename.endswith("/data/0"))
    records[at] = (records[at][0], records[at][1][:-4])


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


ARCHIVES: dict[str, tuple[Callable[[Records], object], str]] = {
    "a record of a wrong size": (resize, "wrong size"),
    "a record that is missing": (lambda r: r.pop(next(n for n, (i, _) in enumerate(r) if "/data/" in i.filename)), "payload"),
    "a record twice": (lambda r: r.append(r[-1]), "twice"),
    "an archive inside": (lambda r: r.insert(0, (zipfile.ZipInfo("a/b/data.pkl"), b"PK")), "out of place"),
    "a name upwards": (lambda r: r.append((zipfile.ZipInfo("../x"), b"")), "out of place"),
    "no pickle": (lambda r: r.pop(0), "no checkpoint"),
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
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_torch_archive_with(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    change, name = ARCHIVES[case]
    repack(source / "release" / "mp_rank_00" / RANK_FILE, change)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, name))


def test_a_compressed_archive(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    repack(path, lambda records: records.append((zipfile.ZipInfo("x/zeros"), bytes(10**8))), zipfile.ZIP_DEFLATED)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "compressed"))


def test_a_record_that_torch_takes_for_a_folder(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    """torch.load reads such a record as zeros."""
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    data = bytearray(path.read_bytes())
    data[data.rindex(b"model_optim_rng/data/6") - 46 + 38] = 0x10
    path.write_bytes(data)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "data/6", "folder"))


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
    for arguments in (convert_it, ("inspect", source), ("verify", tiny_model("llama"), source)):
        refused(1, *arguments, names=("system", case))
    assert not canary.exists()
