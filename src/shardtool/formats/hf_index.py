"""The index of a sharded Hugging Face checkpoint: which file of the directory holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from shardtool.errors import CheckpointError
from shardtool.formats.stored import Stored


def strict_json(data: bytes, where: str) -> dict[str, object]:
    """A JSON object in which no name occurs twice. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in made if names.count(name) > 1)
            raise CheckpointError("a name occurs twice in a JSON object", where=where, found=twice)
        return made

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("a JSON text cannot be read", where=where, found=str(error)[:200]) from None
    if not isinstance(value, dict):
        raise CheckpointError("a JSON text is no object", where=where, found=type(value).__name__)
    return value


def plain_file(directory: Path, name: object, where: str) -> Path:
    """The file `name` of a directory, if it is a plain name of a file that is there and belongs to it.

    A link may lead elsewhere in the directory, or from snapshots/REVISION to blobs/ of the same hub cache.
    Raises CheckpointError.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise CheckpointError(
            "an index names a file outside of its directory", where=where, expected="a plain file name",
            found=repr(name)[:100], hint="do not use this checkpoint: an honest index has no such entry",
        )  # fmt: skip
    path = directory / name
    try:
        target, home = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            "a file of the checkpoint is missing", where=str(path), found=str(error)[:200],
            hint="download or copy the checkpoint again",
        ) from None  # fmt: skip
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not (target.is_relative_to(home) or cached) or not target.is_file():
        raise CheckpointError(
            "a link leads out of the checkpoint", where=str(path), expected=f"a file in {home}", found=str(target)
        )
    return path


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: file name by tensor name. Raises CheckpointError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError("a file cannot be read", where=str(path), found=error.strerror) from None
    weights = strict_json(data, str(path)).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise CheckpointError("an index has no weight_map of file names", where=str(path))
    return weights


def read_shards(
    directory: Path, single: str, index: str, read_file: Callable[[Path], Mapping[str, Stored]]
) -> dict[str, Stored]:
    """All tensors of a checkpoint that is one file, or an index and its shards; the index wins if both are there.

    Every tensor of the index must be in the shard it names, and every tensor of a shard in the index.
    Raises CheckpointError.
    """
    if not (directory / index).exists():
        return dict(read_file(plain_file(directory, single, str(directory))))
    where = str(directory / index)
    weights = read_index(directory / index)
    tensors: dict[str, Stored] = {}
    placed: dict[str, set[str]] = {}
    for tensor, file in weights.items():
        placed.setdefault(file, set()).add(tensor)
    for name, wanted in placed.items():
        found = read_file(plain_file(directory, name, where))
        _agree(wanted, found, weights, f"{directory / name}", where)
        tensors.update({tensor: found[tensor] for tensor in found if tensor in wanted})
    return {tensor: tensors[tensor] for tensor in weights}


def _agree(wanted: set[str], found: Mapping[str, Stored], weights: Mapping[str, str], shard: str, index: str) -> None:
    missing = sorted(wanted - found.keys())
    if missing:
        raise CheckpointError(
            "a shard lacks tensors that the index promises", where=shard, expected=_some(missing),
            found=f"{len(found)} tensors", hint="download or copy this shard again",
        )  # fmt: skip
    extra = sorted(found.keys() - wanted)
    if extra:
        raise CheckpointError(
            "a shard holds tensors that the index does not place there", where=shard, found=_some(extra),
            expected=f"as in {index}: {weights.get(extra[0], 'in no file')}",
            hint="index and shards are of different saves; get them again from one place",
        )  # fmt: skip


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
