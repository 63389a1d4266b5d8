"""A plan executed as a comparison: is every target tensor what the plan would make it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from math import prod
from typing import Any

from msgspec import Struct

from shardtool.execute.assemble import assemble
from shardtool.execute.codecs import Values
from shardtool.execute.lower import moves, tasks
from shardtool.execute.stream import Progress
from shardtool.execute.tiles import Move, Sources, Workspace, clip, fill_tile
from shardtool.formats.stored import ITEMSIZE, Stored, row_major_strides
from shardtool.layout.layout import Key
from shardtool.plan.copies import Plan


class Difference(Struct, frozen=True):
    """A target tensor that is not what the plan makes it: how many elements differ, and the first."""

    key: Key
    elements: int
    first: int
    total: int


def compare(
    plan: Plan,
    locate: Callable[[Key], Stored],
    held: Callable[[Key], Stored],
    *,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[int, list[Difference]]:
    """Execute a plan as a comparison: (elements compared, the tensors that differ). Padding is not compared.

    Bits are compared, after conversion where the target has another dtype. `share` (i, n) is every n-th tensor, from
    number i on.
    """
    compared, differences = 0, []
    sources = Sources()
    space, other = Workspace(sources), Workspace(sources)
    try:
        for task in islice(tasks(plan, lambda key: held(key).dtype), share[0], None, share[1]):
            target = held(task.key)
            width = ITEMSIZE[target.dtype]
            found = moves(task, locate)
            # copies are disjoint, so that many of them as elements leave no padding to look past
            whole = sum(prod(move.shape) for move in found) == prod(task.shape)
            bad = first = count = 0
            for low, tile in assemble(space, task, found):
                theirs = _held(other, target, low, len(tile))
                size = len(tile) // width
                if whole and _same(tile, theirs):
                    count += size
                else:
                    total, amount, at = _differences(tile, theirs, width, None if whole else _written(found, low, size))
                    first = low + at if amount and not bad else first
                    count, bad = count + total, bad + amount
                if progress:
                    progress(len(tile), task.key[0])
            compared += count
            if bad:
                differences.append(Difference(task.key, bad, first, count))
    finally:
        sources.close()
    return compared, differences


def _held(space: Workspace, target: Stored, low: int, size: int) -> memoryview:
    """The bytes of a tensor's elements from number `low` on, row-major and dequantised."""
    tile = space.buffer("tile", size)
    if target.strides is None and target.quantised is None:
        space.read_into(target.file, target.offset + low * ITEMSIZE[target.dtype], tile)
        return tile
    values = Values(target, None) if target.quantised else None
    strides = row_major_strides(target.shape)
    fill_tile(
        space,
        [Move(target.file, target.offset, target.dtype, target.shape, 0, target.strides or strides, 0, strides, values)],
        tile, low, target.dtype,
    )  # fmt: skip
    return tile


def _same(tile: memoryview, other: memoryview) -> bool:
    """Whether two buffers hold the same bytes, without numpy. A comparison of views goes byte by byte, this one does not."""
    return bytearray(tile) == other


def _differences(tile: memoryview, other: memoryview, width: int, mask: Any) -> tuple[int, int, int]:
    """(elements compared, those that differ, the first of them) of two tiles, of those that the mask has or of all."""
    import numpy as np  # noqa: PLC0415 - a conversion has no use for it where all copies are equal

    unequal = np.frombuffer(tile, f"u{width}") != np.frombuffer(other, f"u{width}")
    if mask is not None:
        unequal &= mask
    return (
        len(unequal) if mask is None else int(np.count_nonzero(mask)),
        int(np.count_nonzero(unequal)),
        int(unequal.argmax()),
    )


def _written(sources: Sequence[Move], low: int, count: int) -> Any:
    """Which elements of a tile the copies write (the others are padding)."""
    import numpy as np  # noqa: PLC0415 - as in compare

    mask = np.zeros(count, bool)
    for move in sources:
        for part in clip(move, low, low + count):
            start = part.dst_offset - low
            np.lib.stride_tricks.as_strided(mask[start:], part.shape, part.dst_strides)[...] = True
    return mask
