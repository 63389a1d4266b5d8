"""Hugging Face checkpoints of torch.save files: pytorch_model.bin, or its index and shards."""

from __future__ import annotations

from pathlib import Path

from shardtool.errors import CheckpointError, a_kind
from shardtool.formats import torch_zip
from shardtool.formats.hf_index import read_shards
from shardtool.formats.inert import TensorRef
from shardtool.formats.stored import Stored

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def read_checkpoint(directory: str | Path) -> dict[str, Stored]:
    """All tensors of a checkpoint directory. No payload is read and nothing that a file pickles is run.

    Raises CheckpointError if a file is missing, damaged or no flat state dict, or if index and shards disagree.
    """
    return read_shards(Path(directory), WEIGHTS, INDEX, read_file)


def read_file(path: str | Path) -> dict[str, Stored]:
    """The tensors of one file: a state dict, or one under the single key `state_dict`. Raises CheckpointError."""
    file = torch_zip.read(path)
    root = file.root
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        root = root["state_dict"]
    if not isinstance(root, dict):
        raise CheckpointError(
            "the file holds no state dict",
            where=str(path),
            found=a_kind(root),
            hint="save model.state_dict() with torch.save",
        )
    tensors: dict[str, Stored] = {}
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise CheckpointError(
                "the state dict holds something that is no tensor",
                where=f"{path}: {name}",
                found=a_kind(value),
                hint="save model.state_dict() with torch.save, and nothing beside it",
            )
        tensors[name] = torch_zip.stored_tensor(file, value, name)
    return tensors
