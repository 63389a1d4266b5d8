"""Broken and hostile torch_dist checkpoints: one error that names the file and the tensor."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fuzzing.mutations import _doubling as doubling
from spoiled import Copied, Megatron, Refused


def test_metadata_that_unfolds(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    path = source / "release" / ".metadata"
    path.write_bytes(b"\x80\x02" + doubling(45) + b".")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(".metadata",))
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(".metadata",))


def test_a_distcp_file_with_another_directory_behind_a_tensor(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    path = source / "release" / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x05\x06", b"PK\x05\x07"))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("__0_0.distcp",))


LAST = "decoder.final_layernorm.weight"
OTHER = "output_layer.weight"


def place(metadata: Any, name: str) -> Any:
    """The key under which the bytes of a tensor are listed."""
    return next(index for index in metadata.storage_data if index.fqn == name)


def move(metadata: Any, **changes: Any) -> None:
    index = place(metadata, LAST)
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


def exchange(metadata: Any) -> None:
    one, other = place(metadata, LAST), place(metadata, OTHER)
    data = metadata.storage_data
    data[one], data[other] = data[other], data[one]


def unfold(metadata: Any) -> None:
    metadata.state_dict_metadata[LAST].chunks[0].sizes = torch.Size([32])


def rename(metadata: Any, name: str, new: str) -> None:
    """List a tensor under another name."""
    index = place(metadata, name)
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(name)
    metadata.storage_data[replace(index, fqn=new)] = metadata.storage_data.pop(index)


def coincide(metadata: Any) -> None:
    metadata.storage_data[place(metadata, LAST)] = metadata.storage_data[place(metadata, OTHER)]


METADATA: dict[str, tuple[Callable[[Any], object], str]] = {
    "a tensor without a name": (lambda m: m.state_dict_metadata.update({5: m.state_dict_metadata[LAST]}), "without a name"),
    "bytes that belong to no tensor": (lambda m: m.state_dict_metadata.pop(LAST) and None, LAST),
    "a part without a place": (lambda m: m.storage_data.update({place(m, LAST): "x"}), "'x' where a _StorageInfo belongs"),
    "a compressed part": (lambda m: move(m, transform_descriptors=["zstd"]), "compressed"),
    "a tensor that is in no file": (lambda m: m.storage_data.pop(place(m, LAST)) and None, LAST),
    "a place that cannot be": (lambda m: move(m, offset=-1), "offset -1"),
    "a part behind the end of its file": (lambda m: move(m, offset=2**40), "cut off"),
    "a shape that is a list": (lambda m: setattr(m.state_dict_metadata[LAST], "size", [64]), "where a shape belongs"),
    "an unknown dtype": (
        lambda m: setattr(m.state_dict_metadata[LAST].properties, "dtype", torch.complex64), "not supported"
    ),
    "a tensor without a dtype": (lambda m: setattr(m.state_dict_metadata[LAST], "properties", None), "without a dtype"),
    "parts that do not make up their tensor": (unfold, "do not make up"),
    "two tensors in the same place": (coincide, "overlap"),
    "the places of two tensors exchanged": (exchange, "not what .metadata says"),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_metadata_with(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist"))
    change, name = METADATA[case]
    path = source / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    tensor = {"a tensor without a name": "", "the places of two tensors exchanged": OTHER}.get(case, LAST)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(source / "release", name, tensor))


PLACES: dict[str, tuple[object, str]] = {
    "an absolute path": ("/etc/passwd", "outside of its directory"),
    "a path upwards": ("../__0_0.distcp", "outside of its directory"),
    "a file that is not there": ("__9_0.distcp", "is missing"),
    "a link out of the directory": ("__8_0.distcp", "leads out of the checkpoint"),
    "a name that differs in case": ("__0_0.DISTCP", "upper and lower case"),
    "a number for a file": (7, "outside of its directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_metadata_that_places_a_tensor_in(
    case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch_dist"))
    file, said = PLACES[case]
    path = source / "release" / ".metadata"
    (tmp_path / "elsewhere").write_bytes((source / "release" / "__0_0.distcp").read_bytes())
    (source / "release" / "__8_0.distcp").symlink_to(tmp_path / "elsewhere")
    (source / "release" / "__0_0.DISTCP").write_bytes((tmp_path / "elsewhere").read_bytes())
    metadata = pickle.loads(path.read_bytes())
    move(metadata, relative_path=file)
    path.write_bytes(pickle.dumps(metadata))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(source / "release", LAST, said))


def test_an_embedding_without_a_shape(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist"))
    path = source / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    entry = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    (chunk,) = entry.chunks
    entry.size = chunk.sizes = torch.Size([])
    chunk.offsets = torch.Size([])
    index = place(metadata, "embedding.word_embeddings.weight")
    metadata.storage_data[replace(index, offset=torch.Size([]))] = metadata.storage_data.pop(index)
    path.write_bytes(pickle.dumps(metadata))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(path, "embedding.word_embeddings.weight"))


def test_a_list_in_the_place_of_a_tensor(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist"))
    buffer = io.BytesIO()
    torch.save([1], buffer)
    metadata = pickle.loads((source / "release" / ".metadata").read_bytes())
    file = source / "release" / metadata.storage_data[place(metadata, LAST)].relative_path
    move(metadata, offset=file.stat().st_size, length=len(buffer.getvalue()))
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    (source / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(file, LAST, "holds no tensor"))


COMMON: dict[str, tuple[Callable[[Path], object], str]] = {
    "that is missing": (lambda path: path.unlink(), "no common state"),
    "that holds a list": (lambda path: torch.save([1], path), "no dict"),
}


@pytest.mark.parametrize("case", COMMON)
def test_a_common_pt(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist"))
    change, name = COMMON[case]
    change(source / "release" / "common.pt")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(source / "release", name))


def test_another_backend(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist"))
    (source / "release" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("metadata.json", "zarr"))


NAMES: dict[str, tuple[dict[str, str], str]] = {
    "halves of different shapes": ({LAST: "x.weight_w", OTHER: "x.weight_v"}, "differ in shape"),
    "the fourth expert alone": (
        {LAST: "decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight"}, "do not make one tensor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_tensors_that_are(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist"))
    names, said = NAMES[case]
    path = source / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for old, new in names.items():
        rename(metadata, old, new)
    path.write_bytes(pickle.dumps(metadata))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(path, said))


def test_a_checkpoint_without_an_embedding(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch_dist"))
    path = source / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    rename(metadata, "embedding.word_embeddings.weight", "embedding.weight")
    path.write_bytes(pickle.dumps(metadata))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(path, "no input embedding"))
