"""What torch and safetensors alone say of a checkpoint, written anew as a clean one.

A conversion of a broken checkpoint that was accepted must be the conversion of this clean one, byte for byte.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

torch.serialization.add_safe_globals([Namespace])


class UnreadableError(Exception):
    """The independent reader does not take the checkpoint."""


def rewrite(source: Path, target: Path) -> None:
    """The checkpoint at `source`, read and written by torch and safetensors. Raises UnreadableError."""
    try:
        _rewrite(source, target)
    except BaseException as error:  # torch.distributed has one that is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UnreadableError(f"{type(error).__name__}: {error}"[:300]) from None


def _rewrite(source: Path, target: Path) -> None:
    target.mkdir()
    if (source / "config.json").is_file():
        (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())))
        save_file(_hugging_face(source), target / "model.safetensors")
        return
    tracker = (source / "latest_checkpointed_iteration.txt").read_text().strip()
    name = "release" if tracker == "release" else f"iter_{int(tracker):07d}"
    (target / "latest_checkpointed_iteration.txt").write_text(tracker)
    (target / name).mkdir()
    if (source / name / ".metadata").exists():
        _distributed(source / name, target / name)
        return
    for path in sorted((source / name).glob("mp_rank_*")):
        (target / name / path.name).mkdir()
        content = torch.load(path / "model_optim_rng.pt", weights_only=True)
        torch.save(_copied(content), target / name / path.name / "model_optim_rng.pt")


def _hugging_face(source: Path) -> dict[str, torch.Tensor]:
    index = source / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        held = {file: load_file(source / file) for file in set(names.values())}
        if {(name, file) for file in held for name in held[file]} != set(names.items()):
            raise ValueError("index and shards do not agree")
        return {name: held[file][name] for name, file in names.items()}
    if (source / "model.safetensors").exists():
        return load_file(source / "model.safetensors")
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    tensors = tensors["state_dict"] if isinstance(tensors.get("state_dict"), dict) else tensors
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _copied(value: Any) -> Any:
    """Tensors with a storage of their own, so that the clean file shares nothing with the broken one."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _distributed(source: Path, target: Path) -> None:
    metadata = FileSystemReader(source).read_metadata()
    state: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry).__name__ == "TensorStorageMetadata":
            state[name] = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
    dcp.load(state, storage_reader=FileSystemReader(source), no_dist=True)
    dcp.save(state, storage_writer=FileSystemWriter(target), no_dist=True)
    if (source / "common.pt").exists():
        common = torch.load(source / "common.pt", weights_only=True)
    else:
        held = {"common_state/shard_0_1": io.BytesIO()}
        dcp.load(held, storage_reader=FileSystemReader(source), no_dist=True)
        (common,) = held.values()
        common = common[0] if isinstance(common, list) else common
    torch.save(common, target / "common.pt")
    (target / "metadata.json").write_text(json.dumps(json.loads((source / "metadata.json").read_text())))


def same_files(one: Path, other: Path) -> str:
    """Empty where two directories hold the same files, else the first difference."""
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) for root in (one, other)]
    ignored = {"shardtool.json"}
    if set(names[0]) - ignored != set(names[1]) - ignored:
        return f"files {sorted(set(names[0]) ^ set(names[1]))}"
    for name in names[0]:
        if name not in ignored and (one / name).read_bytes() != (other / name).read_bytes():
            return f"{name} differs"
    return ""


def remove(*paths: Path) -> None:
    """Remove what a run left."""
    for path in paths:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def size(path: Path) -> int:
    """Bytes of a directory."""
    return sum(os.lstat(found).st_size for found in path.rglob("*"))
