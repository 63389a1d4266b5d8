"""Megatron's `torch_dist` format, written: data files laid out before their payload, `.metadata`, `common.pt`.

What megatron-core 0.12 to 0.19 load and torch's FileSystemReader reads: each chunk is a torch.save blob of one tensor,
`.metadata` pickles torch.distributed.checkpoint.metadata.Metadata (torch 2.13; older readers ignore newer fields).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from shardtool.formats import torch_zip_out
from shardtool.formats.inert import DType, Global
from shardtool.formats.megatron_legacy import namespace
from shardtool.formats.pickle_out import Call, Items, Object, Pairs, TensorOut
from shardtool.formats.pickle_out import dump as pickle_dump
from shardtool.formats.stored import BLOCK, Payload, Skeleton
from shardtool.formats.torch_dist import Extent, GlobalTensor

# megatron-core up to 0.18 writes these four keys; 0.19 the first two, and every version reads both forms
METADATA_JSON = (
    b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    b'"common_backend": "torch", "common_backend_version": 1}'
)
# How the keys of the checkpoint were built; the reader's model builds its own in the same way (megatron-core 0.13 on)
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

ChunkSpec = tuple[str, tuple[int, ...], tuple[int, ...], str]  # name, offsets, shape, dtype

GROUPED = 64  # blobs of objects that are one part of a file
_METADATA = "torch.distributed.checkpoint.metadata"
_SIZE = Global("torch", "Size")
_CHUNK = Global(_METADATA, "ChunkStorageMetadata")
_INDEX = Global(_METADATA, "MetadataIndex")
_PLACE = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_TENSOR, _BYTES = Global(_METADATA, "TensorStorageMetadata"), Global(_METADATA, "BytesStorageMetadata")
_PROPERTIES = Global(_METADATA, "TensorProperties")
_LAYOUT = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))


def data_file_skeleton(
    items: Sequence[ChunkSpec],
    objects: Sequence[tuple[str, bytes]] = (),
    residues: Mapping[tuple[str, tuple[int, ...]], int] | None = None,
) -> tuple[Skeleton, list[tuple[int, int]]]:
    """A .distcp file before its payload: one blob per chunk, then the given object blobs.

    `items` are (name, offsets, shape, dtype) of chunks; payload is keyed (name, offsets), and `residues` are places of
    payloads in the file (TensorOut). Returns the skeleton, and
    (position, length) of every blob: those of the items, then those of the objects.
    """
    wanted = residues or {}
    asked = ((shape, dtype, wanted.get((name, offsets), -1)) for name, offsets, shape, dtype in items)
    kinds: dict[tuple[tuple[int, ...], str, int], tuple[tuple[int, ...], str, int]] = {}  # thousands are a few
    size, parts, places, extents = _blobs(tuple([kinds.setdefault(kind, kind) for kind in asked]))
    payload: dict[Hashable, Payload] = {
        (name, offsets): place for (name, offsets, _, _), place in zip(items, places, strict=True)
    }
    if not objects:
        return Skeleton(size, parts, payload), list(extents)
    ends, position = list(extents), size
    for _, blob in objects:
        ends.append((position, len(blob)))
        position += len(blob)
    return Skeleton(position, (*parts, *_object_parts([blob for _, blob in objects], size)), payload), ends


def _object_parts(blobs: Sequence[bytes], position: int) -> Iterator[tuple[int, bytes]]:
    """Blobs of objects one behind the other: most are the same, and so are their groups, which are held once."""
    known: dict[bytes, bytes] = {}
    for at in range(0, len(blobs), GROUPED):
        group = b"".join(blobs[at : at + GROUPED])
        yield position, known.setdefault(group, group)
        position += len(group)


@lru_cache(maxsize=256)
def _blobs(
    tensors: tuple[tuple[tuple[int, ...], str, int], ...],
) -> tuple[int, tuple[tuple[int, bytes], ...], tuple[Payload, ...], tuple[tuple[int, int], ...]]:
    """The blobs of (shape, dtype, residue) one after the other: size, parts, payloads, (position, length) of each.

    Ranks that differ in nothing but their number have the same.
    """
    known: dict[bytes, bytes] = {}  # what stands between two payloads recurs: it is held once
    templates: dict[tuple[tuple[int, ...], str, int], Skeleton] = {}
    parts: list[tuple[int, bytes]] = []
    places: list[Payload] = []
    extents: list[tuple[int, int]] = []
    pending, pending_at, position = bytearray(), 0, 0  # everything between two payloads is one part
    for shape, dtype, residue in tensors:
        within = (residue - position) % BLOCK if residue >= 0 else -1
        template = templates.get((shape, dtype, within))
        if template is None:
            template = torch_zip_out.skeleton(TensorOut(None, dtype, shape, within))
            templates[shape, dtype, within] = template
        place = template.payload[None]
        pending += template.parts[0][1]
        if len(template.parts) == 2:
            between = bytes(pending)
            parts.append((pending_at, known.setdefault(between, between)))
            pending, pending_at = bytearray(template.parts[1][1]), position + template.parts[1][0]
        places.append(Payload(position + place.offset, shape, dtype, tuple([position + at for at in place.crc_at])))
        extents.append((position, template.size))
        position += template.size
    if pending:
        parts.append((pending_at, bytes(pending)))
    return position, tuple(parts), tuple(places), tuple(extents)


def object_blob(value: object) -> bytes:
    """The blob of a ShardedObject: torch.save([value]) (megatron-core dist_checkpointing/strategies/torch.py)."""
    return torch_zip_out.dumps([value])


def extra_state_blob() -> bytes:
    """The blob of an `_extra_state` object without FP8 state: a list of one empty uint8 tensor."""
    return object_blob(TensorOut(None, "uint8", (0,)))


def write_metadata(
    tensors: Mapping[str, GlobalTensor], objects: Mapping[str, Extent], write: Callable[[bytes], object]
) -> None:
    """Hand the `.metadata` file for these tensors and objects to `write`, piece by piece.

    Of the files' paths only the names are written. The mappings are gone through twice, one entry at a time: they may
    make their entries on the way.
    """
    state = {
        "state_dict_metadata": Pairs(_entries(tensors, objects)), "planner_data": None,
        "storage_data": Pairs(_places(tensors, objects)), "storage_meta": None, "version": None,
    }  # fmt: skip
    pickle_dump(Object(Global(_METADATA, "Metadata"), state), write)


def _entries(tensors: Mapping[str, GlobalTensor], objects: Mapping[str, Extent]) -> Iterator[tuple[str, object]]:
    for name, tensor in tensors.items():
        yield name, _tensor_entry(tensor)
    for name in objects:
        yield name, Object(_BYTES, {})


def _places(tensors: Mapping[str, GlobalTensor], objects: Mapping[str, Extent]) -> Iterator[tuple[object, object]]:
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            yield _index(name, chunk.offsets), _place(chunk.blob)
    for name, extent in objects.items():
        yield _index(name, None), _place(extent)


def metadata_bytes(tensors: Mapping[str, GlobalTensor], objects: Mapping[str, Extent]) -> bytes:
    """The `.metadata` file for these tensors and objects."""
    parts: list[bytes] = []
    write_metadata(tensors, objects, parts.append)
    return b"".join(parts)


def common_bytes(
    args: Mapping[str, Any] | None, iteration: int, content_metadata: Mapping[str, object] | None = None
) -> bytes:
    """common.pt: what megatron-core up to 0.18 cannot load without, and later versions prefer.

    `args` are the launch arguments; `content_metadata` are additions to CONTENT_METADATA.
    """
    common: dict[str, object] = {} if args is None else {"args": namespace(args)}
    common |= {"checkpoint_version": 3.0, "iteration": iteration, "num_floating_point_operations_so_far": 0}
    common["content_metadata"] = {**CONTENT_METADATA, **(content_metadata or {})}
    return torch_zip_out.dumps(common)


def _size(value: tuple[int, ...]) -> Call:
    return Call(_SIZE, (value,))


def _index(name: str, offsets: tuple[int, ...] | None) -> Object:
    state = {"fqn": name, "index": None, "offset": None if offsets is None else _size(offsets)}
    return Object(_INDEX, state)


def _place(extent: Extent) -> Object:
    state = {"relative_path": extent.file.rpartition("/")[2], "offset": extent.offset, "length": extent.length}
    return Object(_PLACE, state)


def _tensor_entry(tensor: GlobalTensor) -> Object:
    properties = (DType(tensor.dtype), _LAYOUT, False, _CONTIGUOUS, False)
    chunks = (Object(_CHUNK, {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)}) for chunk in tensor.chunks)
    state = {"properties": Object(_PROPERTIES, properties), "size": _size(tensor.shape), "chunks": Items(chunks)}
    return Object(_TENSOR, state)
