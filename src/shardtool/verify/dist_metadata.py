"""The `.metadata` of a `torch_dist` checkpoint: a pickle, so an allow-list goes over it before megatron-core does.

torch itself unpickles the file without any restriction; what this module has let pass holds only the classes below,
none of which does anything on construction.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shardtool.errors import GET_AGAIN, CheckpointError

_DCP = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"

_ALLOWED = {
    *((f"{_DCP}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    *((f"{_DCP}.planner", name) for name in (
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    )),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}  # fmt: skip

# Classes of megatron-core 0.11 to 0.15. Versions that no longer have them cannot load such a checkpoint themselves.
_OLD = {(_MEGATRON, "MCoreMetadata"): Metadata, (_MEGATRON, "MCoreSavePlan"): None}


class _Inert:
    """Stands for a class that only old versions have; keeps nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        pass


class _Restricted(pickle.Unpickler):
    def __init__(self, file: Any, where: Path) -> None:
        super().__init__(file)
        self.where = where
        self.foreign = False  # a class was named that the installed megatron-core does not have

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OLD:
            self.foreign |= not hasattr(importlib.import_module(module), name)
            return _OLD[module, name] or _Inert
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(importlib.import_module(module), name)
        raise CheckpointError(
            "the checkpoint's index names code that does not belong there", where=str(self.where),
            found=f"{module}.{name}", hint="do not torch.load this checkpoint; ask its author for safetensors",
        )  # fmt: skip


def read(directory: Path) -> tuple[Metadata, bool]:
    """The DCP metadata of a checkpoint, and whether the installed megatron-core can unpickle the file itself.

    Raises CheckpointError when the file is missing, is no such pickle, or names anything outside the allow-list.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            unpickler = _Restricted(file, path)
            metadata = unpickler.load()
    except FileNotFoundError as error:
        raise CheckpointError(
            "the checkpoint has no index", where=str(path), hint="copy .metadata from the save as well"
        ) from error
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint's index cannot be read", where=str(path), found=str(error), hint=GET_AGAIN
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError("the checkpoint's index is not DCP metadata", where=str(path), hint=GET_AGAIN)
    return metadata, not unpickler.foreign


def shape(metadata: Metadata, key: str) -> tuple[int, ...] | None:
    """The global shape of a tensor, None where there is no such tensor."""
    entry = metadata.state_dict_metadata.get(key)
    return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None


def dtype(metadata: Metadata, key: str) -> torch.dtype | None:
    """The stored dtype of a tensor, None where there is no such tensor."""
    entry = metadata.state_dict_metadata.get(key)
    return entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None


def content_metadata(metadata: Metadata) -> dict[str, bool]:
    """megatron-core's `content_metadata` as the keys themselves show it, for checkpoints where it cannot be read."""
    keys = metadata.state_dict_metadata
    per_layer = any(key.startswith("decoder.layers.") and key.split(".")[2].isdecimal() for key in keys)
    return {
        "non_homogeneous_layers": per_layer,
        "singleton_local_shards": any(key.endswith(".linear_fc1.weight_w") for key in keys),
    }
