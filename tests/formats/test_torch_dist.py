"""torch_dist: what megatron-core and torch saved is read, what we write they load, and lies are refused."""

from __future__ import annotations

import io
import pickle
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from filled import DATA, content, load, same, sample, write
from shardtool.errors import CheckpointError
from shardtool.formats.torch_dist import (
    ChunkRef,
    Extent,
    GlobalTensor,
    TorchDist,
    chunk_payload,
    model_prefix,
    read_common,
    read_metadata,
    read_object,
)
from shardtool.formats.torch_dist_out import (
    CONTENT_METADATA,
    METADATA_JSON,
    common_bytes,
    data_file_skeleton,
    extra_state_blob,
    metadata_bytes,
    object_blob,
)

torch.serialization.add_safe_globals([Namespace])

SAVED = sorted(path for kind in ("dense", "tied") for path in DATA.glob(f"*/{kind}/torch_dist/iter_0000100"))
# megatron-core 0.14 and 0.15 pickled their own classes into .metadata: torch alone cannot load those
BY_TORCH = [path for path in SAVED if path.parts[-4] not in ("0.14.0", "0.15.3")]


def name_of(path: Path) -> str:
    return f"{path.parts[-4]}-{path.parts[-3]}"


def assembled(tensor: GlobalTensor) -> torch.Tensor:
    whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    for chunk in tensor.chunks:
        box = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = load(chunk_payload(chunk))
    return whole


def by_torch(directory: Path, metadata: TorchDist) -> dict[str, torch.Tensor]:
    state = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for name, t in metadata.tensors.items()}
    dcp.load(state, storage_reader=FileSystemReader(directory), no_dist=True)
    return state


@pytest.mark.parametrize("directory", BY_TORCH, ids=name_of)
def test_reads_the_tensors_that_torch_reads(directory: Path) -> None:
    metadata = read_metadata(directory)
    theirs = by_torch(directory, metadata)
    assert len(theirs) == 9 and metadata.prefix == ""
    assert all(same(assembled(tensor), theirs[name]) for name, tensor in metadata.tensors.items())


@pytest.mark.parametrize("directory", SAVED, ids=name_of)
def test_reads_what_megatron_core_saved(directory: Path) -> None:
    metadata = read_metadata(directory)
    assert metadata.tensors["decoder.layers.mlp.linear_fc1.weight"].shape == (4, 96, 32)
    assert ("common_state/shard_0_1" in metadata.objects) == (not (directory / "common.pt").exists())
    extra = {name: blob for name, blob in metadata.objects.items() if "_extra_state" in name}
    assert len(extra) >= 16
    assert all(value is None or value.shape == (0,) for value in map(read_object, extra.values()))  # type: ignore[attr-defined]
    common = read_common(directory)
    assert common == read_common(directory, metadata)
    assert common["iteration"] == 100 and common["checkpoint_version"] == 3.0
    assert common["args"]["num_layers"] == 4 and common["args"]["params_dtype"] == "torch.float32"


@pytest.mark.parametrize("directory", SAVED, ids=name_of)
def test_agrees_with_the_per_rank_files_of_the_same_model(directory: Path) -> None:
    from shardtool.formats.megatron_legacy import Rank, read_ranks

    files = read_ranks(directory.parents[1] / "torch" / "iter_0000100")
    embedding = torch.cat([load(files[Rank(tp, 0, 0)].chunks[0]["embedding.word_embeddings.weight"]) for tp in (0, 1)])
    metadata = read_metadata(directory)
    assert same(assembled(metadata.tensors["embedding.word_embeddings.weight"]), embedding)
    proj = metadata.tensors["decoder.layers.self_attention.linear_proj.weight"]
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    last = torch.cat([load(files[Rank(tp, 1, 0)].chunks[0][name]) for tp in (0, 1)], dim=1)
    assert same(assembled(proj)[3], last)


def test_there_is_test_data() -> None:
    assert len(SAVED) >= 7 and len(BY_TORCH) >= 5


def test_reads_what_torch_saves(tmp_path: Path) -> None:
    state = {"a": sample((3, 4), "bfloat16"), "s": torch.tensor(2.5), "e": torch.empty(0, 3), "v": torch.ones(4, 4).t()}
    dcp.save({**state, "o": {"x": 1}}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / "metadata.json").write_bytes(METADATA_JSON)
    metadata = read_metadata(tmp_path)
    assert metadata.tensors.keys() == state.keys()
    assert all(same(assembled(metadata.tensors[name]), tensor.contiguous()) for name, tensor in state.items())
    assert read_object(metadata.objects["o.x"]) == 1


# --- what we write ---------------------------------------------------------------------------------------------------

SHAPES = {
    "decoder.layers.mlp.linear_fc1.weight": ((4, 6, 2), (1, 3, 2), "bfloat16"),
    "decoder.layers.self_attention.linear_proj.weight": ((4, 5, 6), (1, 5, 2), "float32"),
    "decoder.final_layernorm.weight": ((7,), (7,), "float32"),
    "scalar": ((), (), "float32"),
    "empty": ((0, 3), (0, 3), "float32"),
    "expert_bias": ((4,), (3,), "float8_e4m3fn"),
}
OBJECTS = [("decoder.layers.x._extra_state/shard_0_4", extra_state_blob()), ("o/shard_0_1", object_blob({"a": [1.5]}))]


def chunks_of(shape: tuple[int, ...], step: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    def along(axis: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        if axis == len(shape):
            yield (), ()
            return
        for offset in range(0, max(shape[axis], 1), max(step[axis], 1)):
            for offsets, sizes in along(axis + 1):
                yield (offset, *offsets), (min(step[axis], shape[axis] - offset), *sizes)

    return along(0)


def written(root: Path) -> Path:
    items = [
        (name, offsets, sizes, dtype)
        for name, (shape, step, dtype) in SHAPES.items()
        for offsets, sizes in chunks_of(shape, step)
    ]
    skeleton, extents = data_file_skeleton(items, OBJECTS)

    def payload(key: Any) -> bytes:
        name, offsets = key
        shape, _, dtype = SHAPES[name]
        sizes = skeleton.payload[key].shape
        box = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        return content(sample(shape, dtype)[box])

    write(skeleton, root / "__0_0.distcp", payload)
    assert sum(length for _, length in extents) == skeleton.size
    chunks: dict[str, list[ChunkRef]] = {}
    for (name, offsets, sizes, dtype), (position, length) in zip(items, extents, strict=False):
        blob = Extent(str(root / "__0_0.distcp"), position, length)
        chunks.setdefault(name, []).append(ChunkRef(offsets, sizes, dtype, blob, name))
    tensors = {name: GlobalTensor(shape, dtype, tuple(chunks[name])) for name, (shape, _, dtype) in SHAPES.items()}
    blobs = zip(OBJECTS, extents[len(items) :], strict=True)
    objects = {name: Extent(str(root / "__0_0.distcp"), *extent) for (name, _), extent in blobs}
    (root / ".metadata").write_bytes(metadata_bytes(tensors, objects))
    (root / "common.pt").write_bytes(common_bytes({"num_layers": 4, "params_dtype": "torch.bfloat16"}, 7))
    (root / "metadata.json").write_bytes(METADATA_JSON)
    assert read_metadata(root).tensors == tensors and read_metadata(root).objects == objects
    return root


def test_torch_loads_what_we_write(tmp_path: Path) -> None:
    root = written(tmp_path)
    metadata = read_metadata(root)
    state: dict[str, Any] = {
        n: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for n, t in metadata.tensors.items()
    }
    state |= {name: io.BytesIO() for name, _ in OBJECTS}
    dcp.load(state, storage_reader=FileSystemReader(root), no_dist=True)
    for name, (shape, _, dtype) in SHAPES.items():
        assert same(state[name], sample(shape, dtype))
        assert same(assembled(metadata.tensors[name]), sample(shape, dtype))
    empty, other = (state[name] for name, _ in OBJECTS)
    assert len(empty) == 1 and same(empty[0], torch.empty(0, dtype=torch.uint8))
    assert other == [{"a": [1.5]}] and read_object(metadata.objects["o/shard_0_1"]) == {"a": [1.5]}


def test_our_metadata_is_torchs_own_object(tmp_path: Path) -> None:
    theirs = FileSystemReader(written(tmp_path)).read_metadata()
    entry: Any = theirs.state_dict_metadata["decoder.final_layernorm.weight"]
    assert type(entry).__name__ == "TensorStorageMetadata" and entry.size == torch.Size([7])
    assert entry.properties == type(entry.properties)(dtype=torch.float32)
    again = pickle.loads(pickle.dumps(theirs))
    assert again == theirs


def test_our_common_state(tmp_path: Path) -> None:
    root = written(tmp_path)
    theirs = torch.load(root / "common.pt", weights_only=True)
    assert theirs["args"] == Namespace(num_layers=4, params_dtype=torch.bfloat16)
    assert theirs["content_metadata"] == CONTENT_METADATA
    assert read_common(root)["args"] == {"num_layers": 4, "params_dtype": "torch.bfloat16"}
    common = torch.load(io.BytesIO(common_bytes(None, 3, {"non_homogeneous_layers": True})))
    assert "args" not in common and common["content_metadata"]["non_homogeneous_layers"] is True


def test_megatron_core_loads_what_we_write(tmp_path: Path) -> None:
    dist_checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")
    root = written(tmp_path)
    assert dist_checkpointing.load_common_state_dict(str(root))["iteration"] == 7
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        loaded = dist_checkpointing.load_plain_tensors(str(root))
    finally:
        torch.distributed.destroy_process_group()
    assert loaded.keys() >= SHAPES.keys()  # and the common state
    assert all(same(loaded[name], sample(shape, dtype)) for name, (shape, _, dtype) in SHAPES.items())


def test_a_data_file_is_blobs_one_after_the_other() -> None:
    skeleton, extents = data_file_skeleton([("a", (0, 0), (2, 3), "float32"), ("b", (), (), "bfloat16")])
    assert extents[0][0] == 0 and extents[1][0] == extents[0][1]
    assert skeleton.payload["a", (0, 0)].offset % 64 == 0
    assert (skeleton.payload["b", ()].offset - extents[1][0]) % 64 == 0
    assert len(skeleton.parts) == 3  # everything between two payloads is one part
    assert data_file_skeleton([])[0].size == 0


# --- directories that lie --------------------------------------------------------------------------------------------


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        metadata = read_metadata(directory)
        for tensor in metadata.tensors.values():
            for chunk in tensor.chunks:
                chunk_payload(chunk)
        read_common(directory, metadata)
    return str(error.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return written(tmp_path)


def rewrite(root: Path, change: Any) -> str:
    metadata = FileSystemReader(root).read_metadata()
    change(metadata)
    (root / ".metadata").write_bytes(pickle.dumps(metadata))
    return refused(root)


FC1 = "decoder.layers.mlp.linear_fc1.weight"


def test_chunks_that_do_not_tile(saved: Path) -> None:
    def hole(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata[FC1].chunks.pop()
        del metadata.storage_data[type(next(iter(metadata.storage_data)))(FC1, chunk.offsets)]

    assert "do not make up" in rewrite(saved, hole)


def test_chunks_that_overlap(saved: Path) -> None:
    def overlap(metadata: Any) -> None:
        metadata.state_dict_metadata[FC1].chunks[0].sizes = torch.Size([1, 4, 2])

    assert "overlap at" in rewrite(saved, overlap)


def test_chunks_without_bytes_and_bytes_without_chunks(saved: Path) -> None:
    def no_bytes(metadata: Any) -> None:
        metadata.storage_data.popitem()

    def no_chunk(metadata: Any) -> None:
        del metadata.state_dict_metadata["scalar"]

    assert "is in no file" in rewrite(saved, no_bytes)
    shutil.rmtree(saved / "x", ignore_errors=True)
    written(saved)
    assert "belong to no tensor" in rewrite(saved, no_chunk)


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "", "sub/x.distcp"])
def test_files_outside_of_the_directory(saved: Path, name: str) -> None:
    def outside(metadata: Any) -> None:
        info = next(iter(metadata.storage_data.values()))
        info.relative_path = name

    assert "outside of its directory" in rewrite(saved, outside)


def test_transforms_are_refused(saved: Path) -> None:
    def transform(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]

    assert "compressed" in rewrite(saved, transform)


@pytest.mark.parametrize("change", [{"offset": 1}, {"offset": -1}, {"length": 10**9}, {"offset": 10**9}, {"length": 0}])
def test_extents_that_lie(saved: Path, change: dict[str, int]) -> None:
    def lie(metadata: Any) -> None:
        key = list(metadata.storage_data)[3]
        metadata.storage_data[key] = replace(metadata.storage_data[key], **change)

    rewrite(saved, lie)


def test_a_chunk_of_another_shape_or_dtype(saved: Path) -> None:
    def reshape(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
        entry.size = entry.chunks[0].sizes = torch.Size([6])

    def retype(metadata: Any) -> None:
        metadata.state_dict_metadata["decoder.final_layernorm.weight"].properties.dtype = torch.bfloat16

    assert "not what .metadata says" in rewrite(saved, reshape)
    written(saved)
    assert "not what .metadata says" in rewrite(saved, retype)


def test_a_chunk_is_read_by_itself_if_its_head_differs(saved: Path) -> None:
    # the blob of another writer: same shape, dtype and length, other names inside
    metadata = read_metadata(saved)
    chunk = metadata.tensors[FC1].chunks[1]
    expected = load(chunk_payload(chunk))
    path = Path(chunk.blob.file)
    data = bytearray(path.read_bytes())
    end = chunk.blob.offset + chunk.blob.length
    data[chunk.blob.offset : end] = data[chunk.blob.offset : end].replace(b"archive/", b"another/")
    path.write_bytes(data)
    assert same(load(chunk_payload(chunk)), expected)


def test_a_file_that_is_cut_off(saved: Path) -> None:
    path = saved / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert "__0_0.distcp" in refused(saved)
    path.unlink()
    assert "missing" in refused(saved)


def test_metadata_that_is_something_else(saved: Path) -> None:
    path = saved / ".metadata"
    whole = path.read_bytes()
    for data in (b"", whole[:-20], pickle.dumps({"a": 1}), pickle.dumps([]), b"PK\x03\x04"):
        path.write_bytes(data)
        assert ".metadata" in refused(saved)
    path.unlink()
    assert "is missing" in refused(saved)


def test_metadata_that_runs_something(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch canary",)

    monkeypatch.chdir(saved)
    (saved / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "posix.system" in refused(saved)
    written(saved)
    torch.save({"args": Evil()}, saved / "common.pt")
    assert "posix.system" in refused(saved)
    assert not (saved / "canary").exists()


def test_no_common_state(saved: Path) -> None:
    (saved / "common.pt").unlink()
    assert "no common state" in refused(saved)


def test_other_backends(tmp_path: Path) -> None:
    assert "no finished torch_dist checkpoint" in refused(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"")
    assert "fsdp_dtensor" in refused(tmp_path)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "zarr" in refused(tmp_path)


def test_prefixes() -> None:
    assert model_prefix(["decoder.layers.0.x", "embedding.word_embeddings.weight"]) == ""
    assert model_prefix(["model.decoder.layers.x", "optimizer.state.exp_avg.model.decoder.layers.x"]) == "model."
    assert model_prefix(["module.decoder.layers.x"]) == "module."
    assert model_prefix(["optimizer.state.exp_avg.decoder.layers.x", "decoder.layers.x"]) == ""
    assert model_prefix([]) == ""


def test_ten_thousand_chunks_are_quick(tmp_path: Path) -> None:
    items = [("decoder.layers.w", (i, 0), (1, 64), "bfloat16") for i in range(10_000)]
    start = time.perf_counter()
    skeleton, extents = data_file_skeleton(items)
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        file.truncate(skeleton.size)
    chunks = [
        ChunkRef(offsets, sizes, dtype, Extent("__0_0.distcp", *extent), "decoder.layers.w")
        for (_, offsets, sizes, dtype), extent in zip(items, extents, strict=True)
    ]
    tensor = GlobalTensor((10_000, 64), "bfloat16", tuple(chunks))
    (tmp_path / ".metadata").write_bytes(metadata_bytes({"decoder.layers.w": tensor}, {}))
    (tmp_path / "metadata.json").write_bytes(METADATA_JSON)
    assert len(read_metadata(tmp_path).tensors["decoder.layers.w"].chunks) == 10_000
    assert time.perf_counter() - start < 30
