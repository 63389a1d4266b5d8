"""The index of a sharded Hugging Face checkpoint: which file of the directory holds which tensor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from msgspec import UNSET, DecodeError, Raw, Struct, UnsetType
from msgspec.json import Decoder

from shardtool.errors import GET_AGAIN, CheckpointError, a_kind, reason
from shardtool.formats.small_files import INDEX_BYTES, kind_of, no_plain_file, read_small
from shardtool.formats.stored import Stored

MAX_VALUES = 3_000_000  # DeepSeek-V3 in one safetensors file would have one million


def strict_json(data: bytes, where: str) -> dict[str, object]:
    """A JSON object in which no name occurs twice and no number is NaN. Raises CheckpointError.

    A value costs some hundred bytes of memory for one byte of text, so their number is limited.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CheckpointError(
                "a name occurs twice in the JSON text",
                where=f"{where}: {twice}",
                hint="remove the one that is wrong: readers differ in which of the two they take",
            )
        return made

    def constant(name: str) -> object:
        raise ValueError(f"{name} is no JSON")

    if values := too_many(data):
        raise CheckpointError(
            "the JSON text is too large for what it is", where=where, expected=f"at most {MAX_VALUES} values",
            found=f"about {values}", hint="this is not what its name says: look at its beginning",
        )  # fmt: skip
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the JSON text cannot be read", where=where, found=_told(error), hint=GET_AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            "the JSON text is no object",
            where=where,
            expected="{...}",
            found=a_kind(value),
            hint=GET_AGAIN,
        )
    return value


def too_many(data: bytes) -> int:
    """About how many values a JSON text has, where that is more than it may have; else 0."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    return values if values > MAX_VALUES else 0


def _told(error: Exception) -> str:
    """What Python's JSON reader says, without the words for its own limits."""
    if isinstance(error, RecursionError):
        return "lists or objects nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return "a number of thousands of digits" if "integer string conversion" in str(error) else reason(error)


def plain_file(directory: Path, name: object, where: str, tensor: str = "") -> Path:
    """The file `name` of a directory, if it is a plain name of a file that is there and belongs to it.

    `where` is the file that names it, `tensor` the one of its tensors that errors name. A link may lead elsewhere in the
    directory, or from snapshots/REVISION to blobs/ of the same hub cache.
    Raises CheckpointError.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise CheckpointError(
            "a name leads to a file outside of its directory", where=f"{where}: {tensor}" if tensor else where,
            expected="a plain file name", found=repr(name)[:100],
            hint="do not use this checkpoint: an honest index has no such entry",
        )  # fmt: skip
    return inside(directory, directory / name, tensor)


def inside(directory: Path, path: Path, tensor: str = "") -> Path:
    """`path`, if it is a file that belongs to the directory: see plain_file. Raises CheckpointError."""
    where = f"{path}: {tensor}" if tensor else str(path)
    try:
        target, home = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            "a file of the checkpoint is missing", where=where, found=reason(error),
            hint="download or copy the file, or the checkpoint, again",
        ) from None  # fmt: skip
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not (target.is_relative_to(home) or cached):
        raise CheckpointError(
            "a link leads out of the checkpoint", where=where, expected=f"a file in {home}", found=str(target),
            hint="copy the file to its place instead of the link, if you trust where it leads",
        )  # fmt: skip
    if not target.is_file():
        raise no_plain_file(where, kind_of(target.stat().st_mode))
    return path


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: file name by tensor name. Raises CheckpointError."""
    where, data = str(path), read_small(path, INDEX_BYTES)
    weights = _well_formed(data, where)
    if weights is None:
        weights = _checked(data, where)
    first: dict[str, str] = {}
    for tensor, file in weights.items():
        first.setdefault(file, tensor)
    no_twins(first.items(), where)
    return weights


class _Index(Struct, forbid_unknown_fields=True):
    """An index as it has to be."""

    weight_map: dict[str, str]
    metadata: Raw | UnsetType = UNSET


_INDEX = Decoder(_Index)


def _well_formed(data: bytes, where: str) -> dict[str, str] | None:
    """What `_checked` finds, in a third of the time, if all is as it should be; None: look at it more closely.

    A name that occurs twice is seen by the number of strings, as none has an escape in it.
    """
    if b"\\" in data or too_many(data):
        return None
    try:
        index = _INDEX.decode(data)
        beside = b"" if index.metadata is UNSET else bytes(index.metadata)
        if beside:
            strict_json(beside, where)
    except (DecodeError, UnicodeError, RecursionError, CheckpointError):
        return None
    if data.count(b'"') != 2 * (2 * len(index.weight_map) + 1 + bool(beside)) + beside.count(b'"'):
        return None
    names: dict[str, str] = {}  # one text for each file, not one for each of its tensors
    return {tensor: names.setdefault(file, file) for tensor, file in index.weight_map.items()}


def _checked(data: bytes, where: str) -> dict[str, str]:
    """The weight_map of an index, every entry looked at: CheckpointError says which is wrong and how."""
    index = strict_json(data, where)
    weights = index.get("weight_map")
    if not isinstance(weights, dict):
        raise CheckpointError(
            "the index has no weight_map of file names",
            where=where,
            expected="weight_map: {tensor: file, ...}",
            found=", ".join(map(str, index))[:100] or "nothing",
            hint=GET_AGAIN,
        )
    for tensor, file in weights.items():
        if not isinstance(file, str):
            raise CheckpointError(
                "the index names no file for a tensor", where=f"{where}: {tensor}", expected="a file name",
                found=a_kind(file), hint=GET_AGAIN,
            )  # fmt: skip
    return weights


def no_twins(names: Iterable[tuple[str, str]], where: str) -> None:
    """CheckpointError where two file names, each with a tensor of its file, differ in the case of letters only.

    On some systems they are one file.
    """
    folded: dict[str, str] = {}
    for name, tensor in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise CheckpointError(
                "two file names differ in upper and lower case only", where=f"{where}: {tensor}",
                found=f"{other} and {name}",
                hint="they are one file on macOS and Windows: rename one of them, and its entries here",
            )  # fmt: skip


def read_shards(
    directory: Path, single: str, index: str, read_file: Callable[[Path], Mapping[str, Stored]]
) -> dict[str, Stored]:
    """All tensors of a checkpoint that is one file, or an index and its shards.

    Every tensor of the index must be in the shard it names, and every tensor of a shard in the index. Its
    total_size is not looked at: published ones are stale at times, and the tensors are accounted for one by one.
    Raises CheckpointError.
    """
    if not (directory / index).is_symlink() and not (directory / index).exists():
        return dict(read_file(plain_file(directory, single, str(directory))))
    where = str(directory / index)
    weights = read_index(plain_file(directory, index, str(directory)))
    if (directory / single).exists() and single not in weights.values():
        raise CheckpointError(
            "the directory holds two sets of weights", where=str(directory), expected=f"{single} or {index}",
            found=f"both, and the index does not name {single}", hint="move the one away that is not the model's",
        )  # fmt: skip
    tensors: dict[str, Stored] = {}
    places: dict[str, set[str]] = {}
    for tensor, name in weights.items():
        places.setdefault(name, set()).add(tensor)
    paths = {name: plain_file(directory, name, where, min(places[name])) for name in places}  # before any is read
    for name, wanted in places.items():
        found = read_file(paths[name])
        _agree(wanted, found, weights, f"{directory / name}", where)
        tensors.update(found)
    return {tensor: tensors[tensor] for tensor in weights}


def _agree(wanted: set[str], found: Mapping[str, Stored], weights: Mapping[str, str], shard: str, index: str) -> None:
    if wanted == found.keys():
        return
    missing = sorted(wanted - found.keys())
    if missing:
        raise CheckpointError(
            "a shard lacks tensors that the index places there", where=shard, expected=_some(missing),
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
