"""safetensors: headers read strictly, files laid out before their payload, and the index of a sharded checkpoint.

A file is an 8-byte little-endian length, a JSON header of that length, and the payload; offsets in the header count
from the end of the header (https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated

from msgspec import DecodeError, Meta, Struct
from msgspec.json import Decoder

from shardtool.errors import GET_AGAIN, CheckpointError, cut_off, reason, unreadable
from shardtool.formats.hf_index import read_shards, strict_json, too_many
from shardtool.formats.small_files import open_file
from shardtool.formats.stored import BLOCK, ITEMSIZE, Payload, Skeleton, Stored, unsupported_dtype

DTYPES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of safetensors itself

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

TensorSpec = tuple[str, tuple[int, ...], str]  # name, shape, dtype
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


def read_header(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file, in the order of their payload, and the file's metadata. No payload is read.

    Raises CheckpointError for a header that is damaged, ambiguous (a name twice), of an unknown dtype, or that does not
    describe every byte of the file exactly once.
    """
    where = str(path)
    try:
        with os.fdopen(open_file(path), "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise _damaged(where, f"a header of {length} bytes in a file of {size} bytes")
            data = file.read(length)
    except OSError as error:
        raise unreadable(where, reason(error)) from error
    if not data.startswith(b"{"):
        raise _damaged(where, "a header that does not begin with {")
    return _well_formed(data, where, size) or _checked(data, where, size)


def _checked(data: bytes, where: str, size: int) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of a header, every entry looked at: CheckpointError says which is wrong and how."""
    start = 8 + len(data)
    header = strict_json(data, where)
    metadata = _metadata(header.pop("__metadata__", {}), where)
    spans = sorted(
        ((*_span(name, entry, where), name) for name, entry in header.items()), key=lambda span: (span[0], span[1])
    )
    _check_cover([(begin, end, name) for begin, end, _, _, name in spans], start, size, where)
    return {name: Stored(where, start + begin, shape, dtype) for begin, _, shape, dtype, name in spans}, metadata


class _Entry(Struct, forbid_unknown_fields=True):
    """An entry as it has to be."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


_ENTRIES = Decoder(dict[str, _Entry])
_BEGIN = b'{"__metadata__":{"format":"pt"},'  # of nearly every file
_STRINGS = 5  # of an entry: its name, three keys, the dtype


def _well_formed(data: bytes, where: str, size: int) -> tuple[dict[str, Stored], dict[str, str]] | None:
    """What `_checked` finds, in a third of the time, if all is as it should be; None: look at it more closely.

    A name that occurs twice is seen by the number of strings, as none has an escape in it.
    """
    plain = data.startswith(_BEGIN)
    if b"\\" in data or too_many(data):
        return None
    try:
        entries = _ENTRIES.decode(b"{" + data[len(_BEGIN) :] if plain else data)
    except (DecodeError, UnicodeError, RecursionError):
        return None
    if not entries or "__metadata__" in entries or data.count(b'"') != 2 * (_STRINGS * len(entries) + 3 * plain):
        return None
    tensors: dict[str, Stored] = {}
    start = at = 8 + len(data)
    known: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...], int]] = {}  # shapes are few
    for name, entry in sorted(entries.items(), key=_place):
        kind = (entry.dtype, entry.shape)
        if kind not in known:
            if entry.dtype not in DTYPES:
                return None
            dtype = DTYPES[entry.dtype]
            known[kind] = dtype, entry.shape, prod(entry.shape) * ITEMSIZE[dtype]
        dtype, shape, nbytes = known[kind]
        # each begins where the one before ends, and the last ends with the file: every byte belongs to one of them
        if entry.data_offsets != (at - start, at - start + nbytes):
            return None
        tensors[name] = Stored(where, at, shape, dtype)
        at += nbytes
    return (tensors, {"format": "pt"} if plain else {}) if at == size else None


def _place(item: tuple[str, _Entry]) -> tuple[int, int]:
    return item[1].data_offsets


def read_checkpoint(directory: str | Path) -> dict[str, Stored]:
    """All tensors of a Hugging Face checkpoint: model.safetensors, or model.safetensors.index.json and its shards.

    Raises CheckpointError if a file is missing or damaged, if the index leads out of the directory, or if index and
    shards do not hold the same tensors.
    """
    return read_shards(Path(directory), WEIGHTS, INDEX, lambda path: read_header(path)[0])


def skeleton(
    tensors: Sequence[TensorSpec],
    metadata: Mapping[str, str] | None = None,
    residues: Mapping[str, int] | None = None,
) -> Skeleton:
    """A file with these (name, shape, dtype), payload keyed by name; metadata defaults to {"format": "pt"}.

    Header and payload keep the given order, wider dtypes first as safetensors itself sorts them, so that every tensor
    is aligned to its dtype; the header is padded with spaces to a multiple of 8 bytes, and with `residues` further, so
    that most bytes begin at these places modulo BLOCK.
    Raises ValueError for a name that occurs twice and KeyError for a dtype that safetensors does not have.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata if metadata is not None else {"format": "pt"})}
    offset = 0
    offsets: dict[str, tuple[int, tuple[int, ...], str]] = {}
    for name, shape, dtype in sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor[2]]):
        if name in header:
            raise ValueError(f"tensor {name} occurs twice")
        end = offset + prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offsets[name] = (offset, tuple(shape), dtype)
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    wanted: Counter[int] = Counter()
    for name, residue in (residues or {}).items():
        at, shape, dtype = offsets[name]
        wanted[(residue - at) % BLOCK] += prod(shape) * ITEMSIZE[dtype]
    for place, _ in wanted.most_common(1):
        text += b" " * ((place - 8 - len(text)) % BLOCK if place % 8 == 0 else 0)
    start = 8 + len(text)
    payload: dict[Hashable, Payload] = {
        name: Payload(start + at, shape, dtype) for name, (at, shape, dtype) in offsets.items()
    }
    return Skeleton(start + offset, ((0, len(text).to_bytes(8, "little") + text),), payload)


def index_json(weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> bytes:
    """The index as transformers writes it (modeling_utils.save_pretrained, 5.23); sizes in bytes and elements."""
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    index = {"metadata": metadata, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def split_by_size(tensors: Sequence[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """The shards of a checkpoint, at most `max_shard_size` bytes each, filled in the given order.

    As huggingface_hub does it (split_state_dict_into_shards_factory): a tensor larger than a shard gets one of its own.
    """
    shards: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    filled = 0
    for tensor in tensors:
        size = prod(tensor[1]) * ITEMSIZE[tensor[2]]
        if size > max_shard_size:
            shards.append([tensor])
            continue
        if filled + size > max_shard_size:
            shards.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += size
    if current:
        shards.append(current)
    return shards


def shard_names(count: int) -> list[str]:
    """The file names of a checkpoint of `count` shards: model.safetensors, or model-00001-of-0000N.safetensors."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _damaged(where: str, found: str) -> CheckpointError:
    return CheckpointError(
        "the safetensors header is damaged", where=where, found=found,
        hint="it may be a git-lfs pointer in the place of the file, or cut off: download or copy it again",
    )  # fmt: skip


def _unowned(where: str, found: str) -> CheckpointError:
    return CheckpointError("the file has bytes that belong to no tensor", where=where, found=found, hint=GET_AGAIN)


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _damaged(where, "a __metadata__ that is no map of strings")
    return value


def _span(name: str, entry: object, where: str) -> tuple[int, int, tuple[int, ...], str]:
    """Begin, end, shape and dtype of one header entry."""
    where = f"{where}: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(where, "an entry without dtype, shape and data_offsets")
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise unsupported_dtype(where, str(entry["dtype"])[:40], DTYPES)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(where, f"shape {str(shape)[:60]}, data_offsets {str(offsets)[:60]}")
    size = prod(shape) * ITEMSIZE[dtype]
    if offsets[0] > offsets[1]:
        raise _damaged(where, f"data_offsets {offsets}, which end before they begin")
    if offsets[1] - offsets[0] != size:
        raise CheckpointError(
            "a tensor's bytes do not fit its shape", hint=GET_AGAIN, where=where, expected=f"{size} bytes for {shape} {dtype}",
            found=f"{offsets[1] - offsets[0]} bytes",
        )  # fmt: skip
    return offsets[0], offsets[1], tuple(shape), dtype


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(spans: Sequence[tuple[int, int, str]], before_payload: int, file_size: int, where: str) -> None:
    """Every byte of the payload belongs to exactly one tensor."""
    size = file_size - before_payload
    at, before = 0, ""
    for start, end, name in spans:
        if start < at:
            raise CheckpointError(
                "two tensors overlap", where=f"{where}: {name}", found=f"bytes that belong to {before}", hint=GET_AGAIN
            )
        if start > size:
            raise _damaged(f"{where}: {name}", f"data_offsets {[start, end]} in a payload of {size} bytes")
        if start > at:
            raise _unowned(f"{where}: {name}", f"{start - at} bytes before it")
        if end > size:
            raise cut_off(f"{where}: {name}", before_payload + end, before_payload + size)
        at, before = end, name
    if at != size:
        raise _unowned(f"{where}: {before}" if before else where, f"{size - at} bytes at the end, behind it")
