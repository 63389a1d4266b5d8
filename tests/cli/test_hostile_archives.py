"""Broken and hostile torch archives: one error that names the file. Among them is what scripts/fuzz has found."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spoiled import RANK_FILE, Copied, Megatron, Records, Refused, edit_rank, repack


def resize(records: Records) -> None:
    at = next(number for number, (info, _) in enumerate(records) if info.filename.endswith("/data/0"))
    records[at] = (records[at][0], records[at][1][:-4])


EMBEDDING = "model: embedding.word_embeddings.weight"


def put_archive(records: Records, ending: str) -> None:
    """An archive in the archive."""
    inner = io.BytesIO()
    torch.save({"a": torch.ones(4)}, inner)
    at = next(number for number, (info, _) in enumerate(records) if info.filename.endswith(ending))
    records[at] = (records[at][0], inner.getvalue())


def upwards(records: Records) -> None:
    """The persistent id of the first storage has a key that leads out of the archive."""
    at = next(number for number, (info, _) in enumerate(records) if info.filename.endswith("data.pkl"))
    key = b"X\x01\x00\x00\x000"
    assert key in records[at][1]
    records[at] = (records[at][0], records[at][1].replace(key, b"X\x07\x00\x00\x00../../0", 1))


ARCHIVES: dict[str, tuple[Callable[[Records], object], str]] = {
    "a record of a wrong size": (resize, "wrong size"),
    "a record that is missing": (lambda r: r.pop(next(n for n, (i, _) in enumerate(r) if "/data/" in i.filename)), "payload"),
    "a record twice": (lambda r: r.append(r[-1]), "twice"),
    "a record of another folder": (lambda r: r.insert(0, (zipfile.ZipInfo("a/b/data.pkl"), b"PK")), "out of place"),
    "an archive in the place of a tensor": (lambda r: put_archive(r, "/data/0"), EMBEDDING),
    "an archive in the place of its pickle": (lambda r: put_archive(r, "/data.pkl"), "data.pkl"),
    "a storage outside of the archive": (upwards, EMBEDDING),
    "a name upwards": (lambda r: r.append((zipfile.ZipInfo("../x"), b"")), "out of place"),
    "no pickle": (lambda r: r.pop(0), "no checkpoint"),
    "a TorchScript model": (lambda r: r.append((zipfile.ZipInfo("model_optim_rng/constants.pkl"), b"x")), "TorchScript"),
    "the bytes of a big-endian machine": (
        lambda r: r.__setitem__(3, (r[3][0], b"big")), "big-endian"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_torch_archive_with(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    change, name = ARCHIVES[case]
    repack(source / "release" / "mp_rank_00" / RANK_FILE, change)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, name))


END = -22  # of the file: the end record; before it the locator of 20 bytes, and the zip64 end record of 56
LOCATOR, END64 = END - 20, END - 76


def put(at: int, form: str, value: int) -> Callable[[bytearray], None]:
    """Write a number at a place counted from the end."""
    return lambda data: struct.pack_into("<" + form, data, len(data) + at, value)


def listed(count: int) -> Callable[[bytearray], None]:
    """The directory says that it has so many records."""

    def change(data: bytearray) -> None:
        put(END64 + 24, "Q", count)(data)
        put(END64 + 32, "Q", count)(data)

    return change


def entry(name: bytes, at: int, form: str, value: int) -> Callable[[bytearray], None]:
    """Write a number into the directory's entry of a record."""
    return lambda data: struct.pack_into("<" + form, data, data.rindex(b"model_optim_rng/" + name) - 46 + at, value)


def grow(data: bytearray) -> None:
    """A record's bytes reach into the next one."""
    size = int.from_bytes(data[data.rindex(b"model_optim_rng/data/0") - 46 + 20 :][:4], "little")
    entry(b"data/0", 20, "L", size + 100)(data)
    entry(b"data/0", 24, "L", size + 100)(data)


def behind_another(data: bytearray) -> None:
    data[:0] = data


def with_comment(data: bytearray) -> None:
    """A comment behind the end record that is an archive itself."""
    inner = io.BytesIO()
    torch.save({"a": torch.ones(4)}, inner)
    put(END + 20, "H", len(inner.getvalue()))(data)
    data.extend(inner.getvalue())


def apart(data: bytearray) -> None:
    """Four bytes between the directory and the end record, which lies where the locator says."""
    at = len(data) + END64
    data[at:at] = b"more"
    put(LOCATOR + 8, "Q", at + 4)(data)


def flip(data: bytearray) -> None:
    """One bit of the number of layers in the args."""
    at = data.index(b"num_layers")
    data[data.index(b"K", at) + 1] ^= 1


RECORDS: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "a record behind its end": (entry(b"data/0", 42, "L", 2**31), "beyond the end"),
    "records that overlap": (grow, "overlap"),
    "more records than are listed": (listed(45), "ends in the middle"),
    "far more records than bytes": (listed(2**40), "records"),
    "parts on other disks": (put(END + 4, "H", 7), "several files"),
    "a locator of other disks": (put(LOCATOR + 16, "L", 7), "several files"),
    "a zip64 end on other disks": (put(END64 + 16, "L", 7), "several files"),
    "a zip64 end that is elsewhere": (put(LOCATOR + 8, "Q", 10), "that is none"),
    "a directory behind its end": (put(END64 + 48, "Q", 2**40), "into the end record"),
    "an archive before it": (behind_another, "is elsewhere"),
    "bytes before the end record": (apart, "between the directory and the end record"),
    "an archive for a comment": (with_comment, RANK_FILE),
    "a changed bit in the pickle": (flip, "data.pkl with another checksum"),
    "bytes behind its end": (lambda d: d.extend(b"more"), "behind the end"),
    "nothing in it": (lambda d: d.clear(), "no torch.save archive"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_a_torch_archive_whose_bytes_have(
    case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    data = bytearray(path.read_bytes())
    change, name = RECORDS[case]
    change(data)
    path.write_bytes(data)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, name))


def test_a_file_from_before_torch_1_6(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "before 1.6"))


def test_a_directory_of_many_megabytes(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    """The file has holes, which take no room on the disk."""
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    with path.open("r+b") as file:
        file.truncate(70 << 20)
        file.seek(0, 2)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 65 << 20, 4, 0))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, f"a directory of {65 << 20} bytes"))


def test_a_pickle_of_many_megabytes(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    path, name, size = source / "release" / "mp_rank_00" / RANK_FILE, b"x/data.pkl", 513 << 20
    with path.open("wb") as file:
        file.write(struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0, 0, 0, 0, 0, size, size, len(name), 0) + name)
        file.truncate(file.tell() + size)
        at = file.seek(0, 2)
        directory = (
            struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0, 0, 0, 0, 0, 0, 0, size, size, len(name), *(0,) * 6) + name
        )
        file.write(directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), at, 0))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, f"a pickle of {size} bytes"))


LAST = "decoder.final_layernorm.weight"


def beyond(content: dict[str, Any]) -> None:
    content["model"][LAST] = torch.ones(128)[64:]


TENSORS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of an unknown dtype": (
        lambda c: c["model"].update({LAST: torch.ones(64, dtype=torch.complex64)}),
        "not supported",
    ),
    "that repeats its elements": (lambda c: c["model"].update({LAST: torch.ones(1).expand(64)}), "more elements"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    change, name = TENSORS[case]
    source = edit_rank(copied(megatron("llama")), change)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, LAST, name))


def test_a_tensor_that_reaches_beyond_its_storage(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_rank(copied(megatron("llama")), beyond)
    path = source / "release" / "mp_rank_00" / RANK_FILE

    def further(records: Records) -> None:
        number = next(at for at, (info, _) in enumerate(records) if info.filename.endswith("data.pkl"))
        info, data = records[number]
        assert data.count(b"QK@K@") == 1
        records[number] = (info, data.replace(b"QK@K@", b"QKAK@"))

    repack(path, further)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, LAST, "beyond its storage"))


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
