"""A checkpoint that has been opened: its headers, matched against the layout that its model must have."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

from msgspec import Struct

from shardtool.errors import CheckpointError
from shardtool.families.architecture import Architecture
from shardtool.formats.stored import ITEMSIZE, Stored
from shardtool.layout.layout import Key, Layout


class Header(Struct, frozen=True, gc=False):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of its payload."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


class Opened(Struct, frozen=True):
    """One side of a conversion, on disk.

    `headers` has every tensor of the layout, `locate` finds a tensor's payload. `ignored` names what is in the files
    and carries no weights (buffers, `_extra_state`). `place` is the file and about the offset of a tensor, where
    locating it has to read.
    """

    path: Path
    architecture: Architecture
    layout: Layout
    headers: Mapping[Key, Header]
    locate: Callable[[Key], Stored]
    ignored: tuple[str, ...] = ()
    place: Callable[[Key], tuple[str, int]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.headers.values())

    def dtypes(self) -> dict[str, int]:
        """Bytes by dtype."""
        found: dict[str, int] = defaultdict(int)
        for header in self.headers.values():
            found[header.dtype] += header.nbytes
        return dict(found)


def mismatch(
    what: str, where: str, lines: Iterable[str], expected: str | None = None, found: str | None = None
) -> CheckpointError:
    """Tensors that are not those of the model, one line for each, folded over layers."""
    return CheckpointError(
        f"the tensors are not those of the model: {what}", where=where, expected=expected, found=found,
        details=tuple(lines),
        hint="compare config.json (or the checkpoint's args) with the tensors: `shardtool inspect` shows both",
    )  # fmt: skip


def account(layout: Layout, found: Mapping[Key, Header], where: str, ignore: Iterable[str] = ()) -> tuple[str, ...]:
    """Match the tensors found with a layout: the names that are ignored, or one CheckpointError with all that is wrong.

    Missing tensors, tensors that no rule reads, and wrong shapes, folded over layers. `ignore` are patterns of names
    that carry no weights.
    """
    patterns = [re.compile(pattern) for pattern in ignore]
    count = sum(piece.instances for piece in layout.pieces)
    if count > 2 * len(found) + 1_000_000:  # too many to name them
        raise CheckpointError(
            "the model has far more tensors than the checkpoint", where=where, expected=f"{count} tensors",
            found=f"{len(found)} tensors", hint="compare the number of layers and experts with the files",
        )  # fmt: skip
    expected: dict[Key, tuple[int, ...]] = {}
    for piece in layout.pieces:
        expected |= dict.fromkeys(piece.all_keys(), layout.shape(piece))
    missing, wrong = [], []
    for key, shape in expected.items():
        header = found.get(key)
        if header is None:
            missing.append(key)
        elif header.shape != shape:
            wrong.append(key)
    # where all are there, and no more, none is left to be looked at
    extra = [key for key in found if key not in expected] if missing or len(found) != len(expected) else []
    ignored = [key for key in extra if any(pattern.fullmatch(key[1]) for pattern in patterns)]
    unread = sorted(set(extra) - set(ignored))
    if missing or wrong or unread:
        lines = [f"missing: {name}" for name in fold(_shown(key) for key in missing)]
        lines += [f"not known to this architecture: {name}" for name in fold(_shown(key) for key in unread)]
        lines += fold(
            f"wrong shape: {_shown(key)}: expected {list(expected[key])}, found {list(found[key].shape)}"
            for key in wrong
        )
        counts = [(len(missing), "missing"), (len(unread), "not known"), (len(wrong), "of a wrong shape")]
        what = ", ".join(f"{count} {name}" for count, name in counts if count)
        raise mismatch(what, where, lines, f"{len(expected)} tensors", f"{len(found) - len(ignored)} tensors")
    return tuple(sorted({key[1] for key in ignored}))


def _shown(key: Key) -> str:
    file, name, _ = key
    return f"{name} in {file}" if file else name


def fold(names: Iterable[str]) -> list[str]:
    """Names that differ only in a layer number become one line with the numbers as ranges: `layers.{0-31}.mlp`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        place = (name[: match.start()], name[match.end() :]) if match else (name, "")
        groups.setdefault(place, []).extend([int(match.group())] if match else [])
    lines = []
    for (before, after), numbers in groups.items():
        if len(numbers) < 2:
            lines.append(before + "".join(map(str, numbers)) + after)
        else:
            lines.append(f"{before}{{{_ranges(numbers)}}}{after}")
    return lines


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
