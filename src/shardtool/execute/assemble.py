"""One target tensor as tiles: its copies assembled in a buffer, padding where they leave any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from shardtool.execute.lower import Task
from shardtool.execute.tiles import Move, Workspace, fill_tile, tiles
from shardtool.formats.stored import ITEMSIZE

PADDING_BYTES = 64 << 10  # of padding that are laid at once


def assemble(
    space: Workspace,
    task: Task,
    found: Sequence[Move],
    padding_row: bytes | None = None,
    low: int = 0,
    high: int | None = None,
) -> Iterator[tuple[int, memoryview]]:
    """Elements [low, high) of a task's tensor in tiles: (first element, bytes). A tile is valid until the next one."""
    width = ITEMSIZE[task.dtype]
    end = prod(task.shape) if high is None else high
    whole = sum(prod(move.shape) for move in found) == prod(task.shape)  # copies are disjoint: no padding
    for start, stop in tiles(end, width, low, task.shape[-1] if task.shape else 1):
        tile = space.buffer("tile", (stop - start) * width)
        if not whole and sum(_overlap(move, start, stop) for move in found) < stop - start:
            _pad(tile, start, width, padding_row)
        fill_tile(space, found, tile, start, task.dtype)
        yield start, tile


def _overlap(move: Move, low: int, high: int) -> int:
    """The elements of a dense copy in a range; 0 where it is strided in the target (then padding is laid first)."""
    span = 1 + sum((n - 1) * s for n, s in zip(move.shape, move.dst_strides, strict=True))
    if span != prod(move.shape):
        return 0
    return max(0, min(high, move.dst_offset + span) - max(low, move.dst_offset))


def _pad(tile: memoryview, low: int, width: int, row: bytes | None) -> None:
    pattern = row or bytes(width)
    block = pattern * max(1, PADDING_BYTES // len(pattern))
    at, start = 0, low * width % len(pattern)
    while at < len(tile):
        piece = block[start : start + len(tile) - at]
        tile[at : at + len(piece)] = piece
        at, start = at + len(piece), 0
