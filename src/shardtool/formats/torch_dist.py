"""Megatron's `torch_dist` format, read: `.metadata`, `__R_N.distcp`, and the common state.

It is PyTorch DCP (torch.distributed.checkpoint) with two files of Megatron's beside it: `metadata.json`, and up to
megatron-core 0.18 `common.pt`; from 0.19 on the common state is a DCP object `common_state/shard_0_1`
(megatron-core dist_checkpointing/serialization.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from shardtool.errors import GET_AGAIN, CheckpointError, a_kind, cut_off, reason, unreadable
from shardtool.formats import torch_zip
from shardtool.formats.hf_index import no_twins, plain_file, strict_json
from shardtool.formats.inert import DType, Inert, TensorRef, brief, plain
from shardtool.formats.small_files import CONFIG_BYTES, METADATA_BYTES, read_small
from shardtool.formats.stored import ITEMSIZE, Stored, unsupported_dtype
from shardtool.formats.tiles import tiling_fault
from shardtool.formats.unpickle import loads

METADATA = ".metadata"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
WRONG = (AttributeError, TypeError, ValueError, KeyError, IndexError, OverflowError)  # what a damaged .metadata causes

# (sizes, dtype, blob length) -> everything around the payload of the first such blob: pickle, names, headers, directory
_KNOWN: dict[tuple[tuple[int, ...], str, int], tuple[bytes, bytes]] = {}
# what differs between blobs that are alike: checksums behind a payload, in headers and in the directory, and torch's
# serialization id, which is made of them (position of the four bytes of the checksum from the signature)
_CHECKSUMS = ((b"PK\x07\x08", 4), (b"PK\x03\x04", 14), (b"PK\x01\x02", 16))
_SERIALIZATION_ID = re.compile(rb"\.data/serialization_id(?:FB[^\d]*)?(\d{40})")


class Extent(Struct, frozen=True, gc=False):
    """Bytes [offset, offset + length) of a file: one torch.save blob."""

    file: str
    offset: int
    length: int


class ChunkRef(Struct, frozen=True, gc=False):
    """One chunk of a global tensor, elements [offsets, offsets + sizes), and the blob that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    blob: Extent
    name: str  # of its tensor, for errors


class GlobalTensor(Struct, frozen=True):
    """A tensor of the checkpoint; its chunks tile `shape`."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[ChunkRef, ...]


class TorchDist(Struct, frozen=True):
    """What a torch_dist directory holds: tensors and pickled objects by their name (FQN).

    `prefix` stands before the model's names in checkpoints of other frameworks ('model.', 'module.'), else ''.
    """

    directory: str
    tensors: dict[str, GlobalTensor]
    objects: dict[str, Extent]
    prefix: str = ""
    mcore_data: dict[str, Any] = field(default_factory=dict)


def read_metadata(directory: str | Path) -> TorchDist:
    """The tensors and objects of a save, checked: every chunk has its blob, the chunks tile their tensor, the blobs lie
    in files of the directory and do not overlap. No payload is read.

    Raises CheckpointError, naming the first offender, and for another backend than torch_dist.
    """
    directory = Path(directory)
    check_backend(directory)
    path = directory / METADATA
    root = loads(read_small(plain_file(directory, METADATA, str(directory)), METADATA_BYTES), str(path))
    try:
        tensors, objects = _entries(directory, _state(root, "Metadata"), str(path))
    except WRONG as error:
        raise _not_torchs(str(path), error) from None
    extents = [(chunk.blob, name) for name, tensor in tensors.items() for chunk in tensor.chunks]
    _check_extents([*extents, *((blob, name) for name, blob in objects.items())])
    mcore_data = plain(_state(root, "Metadata").get("mcore_data") or {}, str(path))
    return TorchDist(str(directory), tensors, objects, model_prefix(tensors), mcore_data)


def _not_torchs(where: str, error: Exception) -> CheckpointError:
    """Something in .metadata that torch does not write."""
    found = reason(error)
    if isinstance(error, KeyError):
        found = f"no entry {error}"
    elif isinstance(error, AttributeError | TypeError):
        found = "a value of another kind than torch's"
    return CheckpointError(
        "the checkpoint's .metadata is not what torch writes", where=where, found=found, hint=GET_AGAIN
    )


def check_backend(directory: Path) -> None:
    """Raises CheckpointError unless the directory's metadata.json says torch_dist."""
    path = directory / "metadata.json"
    if not path.is_file():
        dcp = (directory / METADATA).is_file()
        raise CheckpointError(
            "the directory is no finished torch_dist checkpoint", where=str(directory), expected="metadata.json",
            found="a plain DCP checkpoint (torch_dcp or fsdp_dtensor), or a save that was cut off" if dcp else "none",
            hint="save it with --ckpt-format torch_dist" if dcp else "give the directory of a finished save",
        )  # fmt: skip
    backend = strict_json(read_small(path, CONFIG_BYTES), str(path)).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(
            "the checkpoint's backend is not supported", where=str(path), expected="torch_dist",
            found=str(backend)[:40],
            hint="load it with megatron-core 0.15 or older and save it with --ckpt-format torch_dist",
        )  # fmt: skip


def model_prefix(names: Iterable[str]) -> str:
    """What stands before the model's names: '' in Megatron's own checkpoints, 'model.' or 'module.' in others'."""
    tops = {name.partition("decoder.layers.")[0] for name in names if "decoder.layers." in name}
    for prefix in ("", "model.", "module.", "model.module.", "model.module.module."):
        if prefix in tops:
            return prefix
    return ""


def chunk_payload(chunk: ChunkRef) -> Stored:
    """Where the elements of a chunk lie, from its blob, checked against shape and dtype. Raises CheckpointError.

    Blobs of one shape, dtype and length are alike but for their payload and its checksums; only the first is parsed.
    """
    blob = chunk.blob
    kind = (chunk.sizes, chunk.dtype, blob.length)
    known = _KNOWN.get(kind)
    if known is not None:
        stored = Stored(blob.file, blob.offset + len(known[0]), chunk.sizes, chunk.dtype)
        if _around(blob, stored) == known:
            return stored
    stored = _parse_chunk(chunk)
    if stored.strides is None and len(_KNOWN) < 4096:
        _KNOWN[kind] = _around(blob, stored)
    return stored


def _around(blob: Extent, stored: Stored) -> tuple[bytes, bytes]:
    """What is before and behind the payload of a blob, without checksums."""
    end = stored.offset + stored.nbytes
    head = _pread(blob.file, blob.offset, stored.offset - blob.offset)
    tail = bytearray(_pread(blob.file, end, blob.offset + blob.length - end))
    for signature, at in _CHECKSUMS:
        found = tail.find(signature)
        while found >= 0:
            tail[found + at : found + at + 4] = bytes(len(tail[found + at : found + at + 4]))
            found = tail.find(signature, found + 4)
    if match := _SERIALIZATION_ID.search(tail):
        tail[match.start(1) : match.end(1)] = bytes(40)
    return head, bytes(tail)


def read_common(directory: str | Path, metadata: TorchDist | None = None) -> dict[str, Any]:
    """The state that is not sharded: args, iteration, checkpoint_version, ... as plain data (namespaces as dicts).

    Read from common.pt (megatron-core up to 0.18), else from the object common_state/shard_0_1 (0.19 and later).
    Raises CheckpointError if there is neither.
    """
    directory = Path(directory)
    path = directory / COMMON_FILE
    if path.is_symlink() or path.exists():
        where, root = str(path), torch_zip.read(plain_file(directory, COMMON_FILE, str(directory))).root
    else:
        metadata = metadata or read_metadata(directory)
        blob = metadata.objects.get(metadata.prefix + COMMON_OBJECT) or metadata.objects.get(COMMON_OBJECT)
        if blob is None:
            raise CheckpointError(
                "the checkpoint has no common state, which holds its args",
                where=str(directory),
                expected=f"{COMMON_FILE}, or the object {COMMON_OBJECT} in .metadata",
                hint="copy common.pt from the save as well",
            )
        where, root = blob.file, read_object(blob)
    common = plain(root, where)
    if not isinstance(common, dict):
        raise CheckpointError(
            "the common state is no dict",
            where=where,
            expected="a dict with args",
            found=a_kind(common),
            hint=GET_AGAIN,
        )
    return common


def read_object(blob: Extent) -> object:
    """The object of a bytes entry; Megatron wraps each in a list of one. Nothing that it pickles is run."""
    root = torch_zip.read(blob.file, blob.offset, blob.length).root
    return root[0] if isinstance(root, list) and len(root) == 1 else root


# --- .metadata -------------------------------------------------------------------------------------------------------


def _state(value: object, name: str) -> dict[Any, Any]:
    if not isinstance(value, Inert) or not value.kind.name.endswith(name) or not isinstance(value.state, dict):
        raise ValueError(f"{brief(value)} where a {name} belongs")
    return value.state


def _entries(
    directory: Path, state: Mapping[str, Any], where: str
) -> tuple[dict[str, GlobalTensor], dict[str, Extent]]:
    blobs = _blobs(directory, state["storage_data"], where)
    tensors: dict[str, GlobalTensor] = {}
    objects: dict[str, Extent] = {}
    for name, entry in state["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise ValueError("an entry without a name")
        try:
            if entry.kind.name == "BytesStorageMetadata":
                objects[name] = _blob(blobs, name, None, where)
            else:
                tensors[name] = _global_tensor(name, _state(entry, "TensorStorageMetadata"), blobs, where)
        except WRONG as error:
            raise _not_torchs(f"{where}: {name}", error) from None
    if blobs:
        (name, offsets), _ = next(iter(blobs.items()))
        raise CheckpointError(
            "bytes are listed that belong to no tensor",
            where=f"{where}: {name}",
            found=f"a part at {list(offsets or ())}",
            hint=GET_AGAIN,
        )
    return tensors, objects


def _blobs(directory: Path, storage: Mapping[Any, Any], where: str) -> dict[tuple[str, tuple[int, ...] | None], Extent]:
    """The blob of every (name, chunk offsets or None)."""
    files: dict[str, tuple[str, int]] = {}
    blobs: dict[tuple[str, tuple[int, ...] | None], Extent] = {}
    first: dict[str, str] = {}  # a tensor of each file, for errors
    for index, info in storage.items():
        key = _state(index, "MetadataIndex")
        fqn = key["fqn"]
        try:
            place = _state(info, "_StorageInfo")
            name, offset, length = place["relative_path"], place["offset"], place["length"]
            at = key.get("offset")
            at = at if at is None else _ints(at)
        except WRONG as error:
            raise _not_torchs(f"{where}: {fqn}", error) from None
        if place.get("transform_descriptors"):
            raise CheckpointError(
                "the checkpoint is compressed", where=f"{where}: {fqn}", found=brief(place["transform_descriptors"]),
                hint="save it without transforms (dist_checkpointing writes none by default)",
            )  # fmt: skip
        if name not in files:
            path = plain_file(directory, name, where, str(fqn))
            files[name], first[name] = (str(path), path.stat().st_size), str(fqn)
        path_name, size = files[name]
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0 or offset + length > size:
            raise _beyond(f"{path_name}: {fqn}", offset, length, size)
        blobs[fqn, at] = Extent(path_name, offset, length)
    no_twins(first.items(), where)
    return blobs


def _beyond(file: str, offset: object, length: object, size: int) -> CheckpointError:
    """A part of the checkpoint that its file does not have."""
    if type(offset) is int and type(length) is int and offset >= 0 and length >= 0:
        return cut_off(file, offset + length, size)
    found = f"offset {brief(offset)}, length {brief(length)}"
    return CheckpointError(
        "the place of a part in its file cannot be", where=file, expected="two sizes", found=found, hint=GET_AGAIN
    )


def _blob(
    blobs: dict[tuple[str, tuple[int, ...] | None], Extent], name: str, offsets: tuple[int, ...] | None, where: str
) -> Extent:
    blob = blobs.pop((name, offsets), None)
    if blob is None:
        at = "" if offsets is None else f" at {list(offsets)}"
        raise CheckpointError(
            "a part of a tensor is in no file",
            where=f"{where}: {name}",
            expected=f"a file for the part{at}",
            hint=GET_AGAIN,
        )
    return blob


def _ints(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise ValueError(f"{brief(value)} where a shape belongs")
    return value


def _global_tensor(
    name: str, fields: Mapping[str, Any], blobs: dict[tuple[str, tuple[int, ...] | None], Extent], where: str
) -> GlobalTensor:
    dtype = _dtype(fields["properties"])
    if dtype not in ITEMSIZE:
        raise unsupported_dtype(f"{where}: {name}", dtype)
    shape = _ints(fields["size"])
    chunks: list[ChunkRef] = []
    for chunk in fields["chunks"]:
        state = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _ints(state["offsets"]), _ints(state["sizes"])
        chunks.append(ChunkRef(offsets, sizes, dtype, _blob(blobs, name, offsets, where), name))
    fault = tiling_fault(shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
    if fault:
        raise CheckpointError(
            "the parts do not make up their tensor",
            where=f"{where}: {name}",
            expected=f"shape {list(shape)}",
            found=fault,
            hint=GET_AGAIN,
        )
    return GlobalTensor(shape, dtype, tuple(chunks))


def _dtype(properties: object) -> str:
    # TensorProperties.__getstate__ is a tuple that begins with the dtype (torch/distributed/checkpoint/metadata.py)
    state = properties.state if isinstance(properties, Inert) else None
    value = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not isinstance(value, DType):
        raise ValueError("a tensor without a dtype")
    return value.name


def _check_extents(extents: Sequence[tuple[Extent, str]]) -> None:
    ordered = sorted((extent.file, extent.offset, extent.length, name) for extent, name in extents)
    for (file, offset, length, name), (other, following, _, behind) in pairwise(ordered):
        if file == other and offset + length > following:
            raise CheckpointError(
                "two parts of the checkpoint overlap", where=f"{file}: {behind}",
                found=f"byte {following}, which belongs to {name}", hint=GET_AGAIN,
            )  # fmt: skip


# --- blobs -----------------------------------------------------------------------------------------------------------


def _parse_chunk(chunk: ChunkRef) -> Stored:
    blob = chunk.blob
    file = torch_zip.read(blob.file, blob.offset, blob.length, chunk.name)
    where = torch_zip.place(blob.file, blob.offset, chunk.name)
    tensor = file.root
    if not isinstance(tensor, TensorRef):
        raise CheckpointError(
            "a part of a tensor holds no tensor",
            where=where,
            expected=f"{chunk.dtype} {list(chunk.sizes)}",
            found=brief(tensor),
            hint=GET_AGAIN,
        )
    if tensor.shape != chunk.sizes or tensor.dtype != chunk.dtype:
        raise CheckpointError(
            "a part of a tensor is not what .metadata says", where=where, expected=f"{chunk.dtype} {list(chunk.sizes)}",
            found=f"{tensor.dtype} {list(tensor.shape)}",
            hint="the files are not of one save, or one of them is damaged: copy them again",
        )  # fmt: skip
    return torch_zip.stored_tensor(file, tensor, chunk.name)


def _pread(file: str, offset: int, size: int) -> bytes:
    try:
        fd = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise unreadable(file, reason(error)) from error
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)
