"""Where the tensors of a torch.save archive lie in its file.

The archive is a zip of stored (uncompressed) records `<name>/data.pkl`, `byteorder`, `data/0`, `data/1`, ...
(caffe2/serialize/inline_container.cc, torch 1.6 and later); it may be a whole file or a range of one (.distcp).
Everything is checked against the file's true size before it is believed, so nothing is read or allocated on the word
of a header.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path

from msgspec import Struct

from shardtool.errors import GET_AGAIN, CheckpointError, cut_off, reason, unreadable
from shardtool.formats.inert import TensorRef
from shardtool.formats.small_files import open_file
from shardtool.formats.stored import ITEMSIZE, Stored, row_major, unsupported_dtype
from shardtool.formats.unpickle import loads

_EOCD = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF
_DIRECTORY_ATTRIBUTE = 0x10  # of DOS; torch reads such a record as zeros
MAX_DIRECTORY = 64 << 20  # a rank's file of DeepSeek-V3 on one rank would have 12 MB
MAX_PICKLE = 512 << 20
_TAIL = 4096  # one read gets the end records and, for a blob of one tensor, the whole directory


class TorchFile(Struct, frozen=True):
    """A torch.save archive: the object it pickles, and per record name (without the archive's) offset and size.

    `records` offsets are bytes from the beginning of the file at `path`.
    """

    path: str
    root: object
    records: dict[str, tuple[int, int]]


class _Window:
    """A range of a file that is read piece by piece; a piece outside of it is an error, not a short read."""

    __slots__ = ("cache", "cached", "fd", "length", "offset", "where")

    def __init__(self, fd: int, offset: int, length: int, where: str) -> None:
        self.fd, self.offset, self.length, self.where = fd, offset, length, where
        self.cached = max(0, length - _TAIL)
        self.cache = os.pread(fd, length - self.cached, offset + self.cached)

    def read(self, position: int, size: int) -> bytes:
        if position < 0 or size < 0 or position + size > self.length:
            raise _broken(self.where, "a record that reaches beyond the end of the archive")
        if position >= self.cached:
            data = self.cache[position - self.cached : position - self.cached + size]
        else:
            data = os.pread(self.fd, size, self.offset + position)
        if len(data) != size:
            raise _broken(self.where, "the file ends in the middle of the archive")
        return data


def _broken(where: str, found: str) -> CheckpointError:
    return CheckpointError(
        "the torch archive is damaged",
        where=where,
        found=found,
        hint=GET_AGAIN,
    )


def place(path: str | Path, offset: int, name: str = "") -> str:
    """Where an archive lies, for errors; `name` is the tensor that it holds, where it is one."""
    return f"{path}{f', archive at byte {offset}' if offset else ''}{f': {name}' if name else ''}"


def read(path: str | Path, offset: int = 0, length: int | None = None, name: str = "") -> TorchFile:
    """Reads the directory and the pickle of the torch.save archive at bytes [offset, offset + length) of a file.

    No payload is read; `name` is the tensor that the archive holds, for errors. Raises CheckpointError for a file that is
    no such archive, is cut off, compressed, big-endian, has overlapping records, a pickle that was changed since it was
    written, or pickles something that a checkpoint has no use for.
    """
    where = place(path, offset, name)
    with _open(path, offset, length, where) as window:
        _check_magic(window)
        directory, entries, checksum = _directory(window)
        records = _locate(window, entries, directory)
        _check_records(window, records)
        start, size = records["data.pkl"]
        pickled = window.read(start, size)
        if checksum and zlib.crc32(pickled) != checksum:  # 0: torch.serialization.set_crc32_options(False)
            raise _broken(window.where, "data.pkl with another checksum than the archive lists for it")
        root = loads(pickled, f"{where}: data.pkl", storages=True)
        absolute = {name: (offset + start, size) for name, (start, size) in records.items()}
    return TorchFile(str(path), root, absolute)


def stored_tensor(file: TorchFile, tensor: TensorRef, name: str = "") -> Stored:
    """Where the elements of a tensor of the archive lie; `name` is for errors.

    Raises CheckpointError if the record is missing or too small for what the pickle says of it.
    """
    where = f"{file.path}: {name}" if name else file.path
    record = file.records.get(f"data/{tensor.storage_key}")
    itemsize = ITEMSIZE.get(tensor.dtype)
    if itemsize is None:
        raise unsupported_dtype(where, tensor.dtype)
    if record is None:
        raise CheckpointError(
            "a tensor's payload is missing", where=where, expected=f"a record data/{tensor.storage_key}", hint=GET_AGAIN
        )
    if record[1] != tensor.storage_nbytes:
        raise CheckpointError(
            "a tensor's payload has the wrong size",
            where=where,
            expected=f"{tensor.storage_nbytes} bytes",
            found=f"{record[1]} bytes",
            hint=GET_AGAIN,
        )
    span = 0
    if 0 not in tensor.shape:
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
        span = (tensor.offset_elements + last + 1) * itemsize
    if prod(tensor.shape) * itemsize > record[1]:  # torch.expand: no weight is stored like that
        raise CheckpointError(
            "a tensor has more elements than its storage", where=where, expected=f"at most {record[1]} bytes",
            found=f"{prod(tensor.shape) * itemsize} bytes", hint="save it with .contiguous()",
        )  # fmt: skip
    if span > record[1]:
        raise CheckpointError(
            "a tensor reaches beyond its storage",
            where=where,
            expected=f"at least {span} bytes",
            found=f"{record[1]} bytes",
            hint=GET_AGAIN,
        )
    strides = None if row_major(tensor.shape, tensor.strides) else tensor.strides
    return Stored(file.path, record[0] + tensor.offset_elements * itemsize, tensor.shape, tensor.dtype, strides)


@contextmanager
def _open(path: str | Path, offset: int, length: int | None, where: str) -> Iterator[_Window]:
    fd = open_file(path, where)
    try:
        size = os.fstat(fd).st_size
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise cut_off(where, offset + length, size)
        yield _Window(fd, offset, length, where)
    except OSError as error:
        raise unreadable(where, reason(error)) from error
    finally:
        os.close(fd)


def _check_magic(window: _Window) -> None:
    if window.length >= 4 and window.read(0, 4) == b"PK\x03\x04":
        return
    raise CheckpointError(
        "the file is no torch.save archive",
        where=window.where,
        expected="a zip file, as torch.save writes since torch 1.6",
        found="an empty file" if window.length == 0 else "another format (torch before 1.6 wrote plain pickles)",
        hint="load it with the torch that wrote it and save it again with torch.save of torch 1.6 or later",
    )


def _directory(window: _Window) -> tuple[int, list[tuple[str, int, int]], int]:
    """The position of the central directory, (name, position of the local header, size) of every record in it, and the
    checksum of data.pkl (0: none).
    """
    position, size, count = _end_records(window)
    if size > MAX_DIRECTORY:
        raise _broken(window.where, f"a directory of {size} bytes, where {MAX_DIRECTORY} are the most")
    data = window.read(position, size)
    if b"/constants.pkl" in data:  # its code is compressed, so this comes before the check for that
        raise CheckpointError(
            "the archive holds no checkpoint", where=window.where, expected="a state dict", found="a TorchScript model",
            hint="save model.state_dict() with torch.save instead of the scripted model",
        )  # fmt: skip
    entries: list[tuple[str, int, int]] = []
    at = checksum = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(data):
            raise _broken(window.where, "a directory that ends in the middle")
        header = _CENTRAL.unpack_from(data, at)
        magic, flags, method, compressed, plain = header[0], header[3], header[4], header[8], header[9]
        name_end = at + _CENTRAL.size + header[10]
        extra_end = name_end + header[11]
        name = data[at + _CENTRAL.size : name_end].decode("utf-8", "replace")
        plain, compressed, local = _zip64(data[name_end:extra_end], plain, compressed, header[16])
        if magic != b"PK\x01\x02" or flags & 1 or method != 0 or plain != compressed:
            raise _broken(window.where, f"{name[:80] or 'a record'} is compressed, encrypted or no record")
        if header[13] or header[15] & _DIRECTORY_ATTRIBUTE:
            raise _broken(window.where, f"{name[:80]} is a folder, or in another file of the archive")
        entries.append((name, local, plain))
        if name.partition("/")[2] == "data.pkl":
            checksum = header[7]
        at = extra_end + header[12]
    return position, entries, checksum


def _end_records(window: _Window) -> tuple[int, int, int]:
    """Position and size of the central directory, and how many records it has."""
    at = window.length - _EOCD.size
    if at < 0 or window.read(at, 4) != b"PK\x05\x06":
        # a comment behind the end record: torch writes none, other tools may
        back = min(window.length, 65535 + _EOCD.size)
        found = window.read(window.length - back, back).rfind(b"PK\x05\x06")
        at = window.length - back + found if found >= 0 else window.length
    if at + _EOCD.size > window.length:
        raise _broken(window.where, "no end record: the archive is cut off")
    _, disk, first_disk, here, count, size, position, comment = _EOCD.unpack(window.read(at, _EOCD.size))
    if (disk or first_disk or here != count) and (disk, first_disk) != (_FULL >> 16,) * 2:
        raise _broken(window.where, "an archive of several files")
    if at + _EOCD.size + comment != window.length:
        raise _broken(window.where, "bytes behind the end record")
    before = at - _LOCATOR.size
    if before >= 0 and window.read(before, 4) == b"PK\x06\x07":
        _, disk, at64, disks = _LOCATOR.unpack(window.read(before, _LOCATOR.size))
        if disk or disks > 1:
            raise _broken(window.where, "an archive of several files")
        fields = _EOCD64.unpack(window.read(at64, _EOCD64.size))
        if fields[0] != b"PK\x06\x06":
            raise _broken(window.where, "a zip64 end record that is none")
        if fields[4] or fields[5] or fields[6] != fields[7]:
            raise _broken(window.where, "an archive of several files")
        if at64 + _EOCD64.size != before:
            raise _broken(window.where, "a zip64 end record that is elsewhere")
        count, size, position, at = fields[7], fields[8], fields[9], at64
    if count * _CENTRAL.size > size:
        raise _broken(window.where, f"a directory of {size} bytes for {count} records")
    if position + size > at:
        raise _broken(window.where, "a directory that reaches into the end record")
    if (
        size <= MAX_DIRECTORY and position + size < at
    ):  # readers differ in where they look for it: two archives one behind the other
        raise _broken(window.where, "bytes between the directory and the end record")
    return position, size, count


def _zip64(extra: bytes, plain: int, compressed: int, local: int) -> tuple[int, int, int]:
    """Sizes and offset from the zip64 field, where the 32-bit ones are full."""
    values = [plain, compressed, local]
    at = 0
    while at + 4 <= len(extra) and _FULL in values:
        tag, size = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            wide = list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4)) if at + 4 + size <= len(extra) else []
            values = [wide.pop(0) if value == _FULL and wide else value for value in values]
            break
        at += 4 + size
    return values[0], values[1], values[2]


def _locate(window: _Window, entries: list[tuple[str, int, int]], directory: int) -> dict[str, tuple[int, int]]:
    """Position and size of every record's payload by its name below the archive's, from the local headers."""
    records: dict[str, tuple[int, int]] = {}
    taken: list[tuple[int, int, str]] = []
    top = entries[0][0].partition("/")[0] if entries else ""
    for name, local, size in entries:
        header = _LOCAL.unpack(window.read(local, _LOCAL.size))
        name_end = local + _LOCAL.size + header[9]
        start = name_end + header[10]
        head, _, short = name.partition("/")
        if header[0] != b"PK\x03\x04" or start + size > directory or head != top or not short:
            raise _broken(window.where, f"record {name!r:.80} out of place")
        if short in records or window.read(local + _LOCAL.size, header[9]).decode("utf-8", "replace") != name:
            raise _broken(window.where, f"record {name!r:.80} twice, or under another name in its own header")
        records[short] = (start, size)
        taken.append((local, start + size, name))
    taken.sort()
    for (_, end, name), (following, _, other) in pairwise(taken):
        if end > following:
            raise _broken(window.where, f"records {name!r:.80} and {other!r:.80} overlap")
    return records


def _check_records(window: _Window, records: dict[str, tuple[int, int]]) -> None:
    if "data.pkl" not in records:
        raise CheckpointError(
            "the archive holds no checkpoint", where=window.where, expected="a record data.pkl",
            found=", ".join(sorted(records)[:5]) or "no record", hint=GET_AGAIN,
        )  # fmt: skip
    if records["data.pkl"][1] > MAX_PICKLE:
        raise _broken(window.where, f"a pickle of {records['data.pkl'][1]} bytes, where {MAX_PICKLE} are the most")
    order = records.get("byteorder")
    if order is not None and (order[1] != 6 or window.read(*order) != b"little"):
        raise CheckpointError(
            "the archive was written on a big-endian machine", where=window.where,
            hint="load it with torch and save it again on a little-endian machine",
        )  # fmt: skip
