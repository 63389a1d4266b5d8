"""One target tensor, tile by tile: which part of which copy falls into a tile, and how its bytes get there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from shardtool.errors import CheckpointError
from shardtool.formats.stored import ITEMSIZE
from shardtool.layout.equation import nested_boxes

TILE_BYTES = 1 << 20  # larger buffers leave the cache and are slower
SPAN_FACTOR = 4  # read up to this many times the wanted bytes at once rather than in many small pieces


@dataclass(frozen=True, slots=True)
class Move:
    """A strided copy with its source found: elements of `dtype` in `file` from byte `start`. Offsets count elements."""

    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]


def numpy_dtype(name: str, *, values: bool) -> Any:
    """The numpy dtype of a torch dtype name. Without `values` only the width matters, and no extension is imported."""
    if not values:
        return np.dtype(f"u{ITEMSIZE[name]}")
    if hasattr(np, name) and name != "bool":
        return np.dtype(name)
    if name == "bool":
        return np.dtype(bool)
    import ml_dtypes  # noqa: PLC0415 - only casts need it

    return np.dtype(getattr(ml_dtypes, name))


def coalesce(move: Move) -> Move:
    """The same copy with neighbouring axes merged where both sides run on."""
    dims = [d for d in zip(move.shape, move.src_strides, move.dst_strides, strict=True) if d[0] != 1]
    merged: list[tuple[int, int, int]] = []
    for size, src, dst in dims:
        if merged and merged[-1][1] == src * size and merged[-1][2] == dst * size:
            merged[-1] = (merged[-1][0] * size, src, dst)
        else:
            merged.append((size, src, dst))
    shape, src_strides, dst_strides = (tuple(d[i] for d in merged) for i in range(3))
    return Move(move.file, move.start, move.dtype, shape, move.src_offset, src_strides, move.dst_offset, dst_strides)


def clip(move: Move, low: int, high: int) -> Iterator[Move]:
    """The parts of a copy whose target elements lie in [low, high)."""
    span = move.dst_offset + sum((n - 1) * s for n, s in zip(move.shape, move.dst_strides, strict=True)) + 1
    if move.dst_offset >= low and span <= high:
        yield move
        return
    if move.dst_offset >= high or span <= low:
        return
    extents = [
        (str(at), stride, size) for at, (size, stride) in enumerate(zip(move.shape, move.dst_strides, strict=True))
    ]
    for box in nested_boxes(extents, low - move.dst_offset, high - move.dst_offset):
        starts = [box[str(at)][0] for at in range(len(move.shape))]
        yield Move(
            move.file,
            move.start,
            move.dtype,
            tuple(box[str(at)][1] - box[str(at)][0] for at in range(len(move.shape))),
            move.src_offset + sum(i * s for i, s in zip(starts, move.src_strides, strict=True)),
            move.src_strides,
            move.dst_offset + sum(i * s for i, s in zip(starts, move.dst_strides, strict=True)),
            move.dst_strides,
        )


class Workspace:
    """The buffers and the open source files of one worker thread."""

    def __init__(self) -> None:
        self.tile = np.empty(0, np.uint8)
        self.span = np.empty(0, np.uint8)
        self._files: dict[str, int] = {}

    def buffer(self, name: str, size: int) -> Any:
        """A reused buffer of at least `size` bytes, as a view of exactly that many."""
        held = getattr(self, name)
        if len(held) < size:
            held = np.empty(size, np.uint8)
            setattr(self, name, held)
        return held[:size]

    def read_into(self, file: str, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a file from `offset` on; CheckpointError when the file ends before."""
        descriptor = self._files.get(file)
        if descriptor is None:
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError("a source file cannot be opened", where=file, found=str(error)) from error
            self._files[file] = descriptor
        done = 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    "a source file ends before its tensor does",
                    where=file,
                    expected=f"at least {offset + len(target)} bytes",
                    found=f"{offset + done} bytes",
                )
            done += count

    def close(self) -> None:
        """Close the source files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def fill_tile(work: Workspace, moves: Sequence[Move], tile: Any, low: int, dtype: str) -> int:
    """Put the parts of `moves` that fall into a tile into it; the number of elements that were written.

    `tile` holds the target's elements from number `low` on, as bytes. Where a source has another dtype than the
    target, each element is converted on its way (rounded once, to nearest even).
    """
    width = numpy_dtype(dtype, values=False).itemsize
    written = 0
    for move in moves:
        for part in clip(move, low, low + len(tile) // width):
            _place(work, part, tile, low, dtype)
            written += prod(part.shape)
    return written


def _place(work: Workspace, part: Move, tile: Any, low: int, dtype: str) -> None:
    same = part.dtype == dtype
    width = numpy_dtype(part.dtype, values=False).itemsize
    at = part.dst_offset - low
    if same and _row_major(part.shape, part.src_strides) and _row_major(part.shape, part.dst_strides):
        count = prod(part.shape) * width
        work.read_into(
            part.file, part.start + part.src_offset * width, memoryview(tile)[at * width : at * width + count]
        )
        return
    for piece in _readable(part, width):
        target = tile.view(numpy_dtype(dtype, values=not same))
        view = np.lib.stride_tricks.as_strided(
            target[piece.dst_offset - low :],
            piece.shape,
            tuple(s * target.itemsize for s in piece.dst_strides),
        )
        span = 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.src_strides, strict=True))
        raw = work.buffer("span", span * width)
        work.read_into(piece.file, piece.start + piece.src_offset * width, memoryview(raw))
        source = raw.view(numpy_dtype(part.dtype, values=not same))
        values = np.lib.stride_tricks.as_strided(source, piece.shape, tuple(s * width for s in piece.src_strides))
        np.copyto(view, values, casting="unsafe")


def _readable(part: Move, width: int) -> Iterator[Move]:
    """A copy cut along its widest source axis until reading the whole span of each piece is worth it."""
    span = 1 + sum((n - 1) * s for n, s in zip(part.shape, part.src_strides, strict=True))
    volume = prod(n for n, s in zip(part.shape, part.src_strides, strict=True) if s)
    if span <= SPAN_FACTOR * volume and span * width <= SPAN_FACTOR * TILE_BYTES:
        yield part
        return
    axis = max(range(len(part.shape)), key=lambda at: part.src_strides[at] * (part.shape[at] > 1))
    if part.shape[axis] == 1:
        yield part
        return
    # halves rather than single indices: dense parts stay whole
    half = part.shape[axis] // 2
    for start, size in ((0, half), (half, part.shape[axis] - half)):
        shape = tuple(size if at == axis else n for at, n in enumerate(part.shape))
        yield from _readable(
            Move(
                part.file,
                part.start,
                part.dtype,
                shape,
                part.src_offset + start * part.src_strides[axis],
                part.src_strides,
                part.dst_offset + start * part.dst_strides[axis],
                part.dst_strides,
            ),
            width,
        )


def _row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def tiles(numel: int, width: int) -> Iterator[tuple[int, int]]:
    """The element ranges in which a tensor is written, in order."""
    step = max(1, TILE_BYTES // width)
    for low in range(0, numel, step):
        yield low, min(low + step, numel)
