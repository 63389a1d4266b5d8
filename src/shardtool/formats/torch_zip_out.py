"""Archives as torch.save writes them, laid out before their payload is known.

Byte for byte the layout of torch 2.13 (caffe2/serialize/inline_container.cc with its miniz): stored records `data.pkl`,
`.format_version`, `.storage_alignment`, `byteorder`, `data/0` ..., `version`, `.data/serialization_id`, each payload on
a multiple of 64 bytes from the archive's start (an extra field "FB" pads the local header), CRC and sizes in a data
descriptor behind the payload, zip64 end records always, zip64 fields where a size or an offset reaches 2**32 - 1.
torch can compute storage offsets from exactly this layout (torch.utils.serialization.config.load, 2.7 and later).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Hashable, Mapping, Sequence
from math import prod

from msgspec import Struct

from shardtool.formats.pickle_out import TensorOut
from shardtool.formats.pickle_out import dumps as pickle_dumps
from shardtool.formats.stored import BLOCK, ITEMSIZE, Payload, Skeleton

_ALIGNMENT = 64
_FULL = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3L2H").pack
_CENTRAL = struct.Struct("<4s6H3L5H2L").pack
_UTF8, _DESCRIPTOR = 1 << 11, 1 << 3


class _Record(Struct, frozen=True):
    """One record: its bytes, or the tensor whose payload comes later."""

    name: bytes
    data: bytes = b""
    tensor: TensorOut | None = None


def skeleton(root: object, name: str = "archive") -> Skeleton:
    """The archive that torch.save would write for `root`, without the payload of its tensors.

    `root` is what pickle_out.dumps takes; payload is keyed by TensorOut.key and each has two places for its CRC.
    Tensors without elements need no payload. The bytes are a function of the arguments alone.
    """
    pickled, tensors = pickle_dumps(root)
    top = f"{name}/".encode()
    records = [
        _Record(top + b"data.pkl", pickled),
        _Record(top + b".format_version", b"1"),
        _Record(top + b".storage_alignment", b"%d" % _ALIGNMENT),
        _Record(top + b"byteorder", b"little"),
        *(_Record(top + b"data/%d" % i, tensor=tensor) for i, tensor in enumerate(tensors)),
        _Record(top + b"version", b"3\n"),
    ]
    # torch: hash of the record names and the CRC of all payloads, which is not known yet; readers only log it
    digest = hashlib.sha256(b"\0".join(record.name for record in records) + pickled).digest()
    identity = b"%020d%020d" % (int.from_bytes(digest[:8], "little"), zlib.crc32(pickled))
    return _layout([*records, _Record(top + b".data/serialization_id", identity)])


def dumps(value: object, payload: Mapping[Hashable, bytes] | None = None) -> bytes:
    """What torch.save writes for `value`, the payload of its non-empty tensors given by key."""
    return fill(skeleton(value), payload or {})


def fill(archive: Skeleton, payload: Mapping[Hashable, bytes]) -> bytes:
    """A small file from its skeleton and all of its payload. Raises ValueError for payload of the wrong size."""
    data = bytearray(archive.size)
    for position, part in archive.parts:
        data[position : position + len(part)] = part
    for key, place in archive.payload.items():
        content = payload.get(key, b"")
        if len(content) != place.nbytes:
            raise ValueError(f"payload {key!r} has {len(content)} bytes instead of {place.nbytes}")
        data[place.offset : place.offset + len(content)] = content
        for position in place.crc_at:
            data[position : position + 4] = zlib.crc32(content).to_bytes(4, "little")
    return bytes(data)


def _layout(records: Sequence[_Record]) -> Skeleton:
    parts: list[tuple[int, bytes]] = []
    pending, pending_at = bytearray(), 0  # bytes not yet in parts; everything between two payloads is one part
    central = bytearray()
    places: list[tuple[TensorOut, int, int, int]] = []  # tensor, offset, CRC in the descriptor, CRC in the directory
    position = 0
    for record in records:
        local_at = position
        size = len(record.data) if record.tensor is None else _nbytes(record.tensor)
        crc = zlib.crc32(record.data)
        residue = -1 if record.tensor is None else record.tensor.residue
        pending += _local_header(record.name, local_at, size, residue)
        position = pending_at + len(pending)
        if record.tensor is None:
            pending += record.data
        else:
            # the CRC stands at byte 4 of the descriptor and at byte 16 of the directory's entry
            places.append((record.tensor, position, position + size + 4, len(central) + 16))
            if size:
                parts.append((pending_at, bytes(pending)))
                pending, pending_at = bytearray(), position + size
        central += _central_header(record.name, local_at, size, crc)
        if size:
            pending += _descriptor(local_at, size, crc)
        position = pending_at + len(pending)
    pending += central + _end_records(len(records), len(central), position)
    parts.append((pending_at, bytes(pending)))
    payload: dict[Hashable, Payload] = {}
    for tensor, offset, in_descriptor, in_central in places:
        crc_at = (in_descriptor, position + in_central) if _nbytes(tensor) else ()
        payload[tensor.key] = Payload(offset, tensor.shape, tensor.dtype, crc_at)
    return Skeleton(pending_at + len(pending), tuple(parts), payload)


def _nbytes(tensor: TensorOut) -> int:
    return prod(tensor.shape) * ITEMSIZE[tensor.dtype]


def _zip64(local_at: int, size: int, compressed: int) -> bytes:
    """The zip64 extra field: the values that do not fit 32 bits."""
    values = (size, compressed) if size >= _FULL else ()
    if local_at >= _FULL:
        values = (*values, local_at)
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _flags(size: int) -> int:
    return _UTF8 | (_DESCRIPTOR if size else 0)


def _local_header(name: bytes, local_at: int, size: int, residue: int = -1) -> bytes:
    wide = _zip64(local_at, size, 0)  # miniz does not know the second size yet when it writes this
    # inline_container.cc, getPadding: the four bytes of the field's own header come before the aligned position
    start = local_at + 30 + len(name) + len(wide) + 4
    padding = -start % _ALIGNMENT if residue < 0 else (residue - start) % BLOCK
    extra = wide + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return _LOCAL(b"PK\x03\x04", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _descriptor(local_at: int, size: int, crc: int) -> bytes:
    wide = size >= _FULL or local_at >= _FULL
    return struct.pack("<4sLQQ" if wide else "<4sLLL", b"PK\x07\x08", crc, size, size)


def _central_header(name: bytes, local_at: int, size: int, crc: int) -> bytes:
    wide = _zip64(local_at, size, size)
    short = min(size, _FULL)
    head = _CENTRAL(b"PK\x01\x02", 0, 0, _flags(size), 0, 0, 0, crc, short, short, len(name), len(wide), 0, 0, 0, 0,
                    min(local_at, _FULL))  # fmt: skip
    return head + name + wide


def _end_records(count: int, size: int, position: int) -> bytes:
    short = min(count, 0xFFFF)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, size, position)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, position + size, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, short, short, min(size, _FULL), min(position, _FULL), 0)
    return wide + locator + end
