"""One target tensor, tile by tile: which part of which copy falls into a tile, and how its bytes get there.

Bytes that only move are put in place by the kernel: one preadv over many pieces of a buffer. numpy is imported when
elements are rearranged one by one or converted; a conversion without that starts sooner.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from shardtool.errors import cut_off, reason, unreadable
from shardtool.execute import buffers
from shardtool.execute.buffers import SPAN_FACTOR
from shardtool.execute.codecs import Values, read_values
from shardtool.execute.lookup import look_up
from shardtool.execute.numbers import numpy, numpy_dtype
from shardtool.formats.stored import ITEMSIZE
from shardtool.layout.equation import nested_boxes

TILE_BYTES = 2 << 20  # of one read and one write: 1 MiB took 8 to 15 % longer, 4 MiB 6 % less for twice the memory
IOV_MAX = 1024  # pieces that one preadv fills
KEPT_ROWS = 64  # lists of such pieces that a worker keeps
ROW_BYTES = 64  # rows from here on are placed by preadv, shorter ones copied
GAP_BYTES = 16 << 10  # read over gaps up to this long between rows rather than row by row


class Move(NamedTuple):
    """A strided copy with its source found: elements of `dtype` in `file` from byte `start`. Offsets count elements.

    `values` is there where the elements are computed from what is stored.
    """

    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]
    values: Values | None = None


def coalesce(move: Move) -> Move:
    """The same copy with neighbouring axes merged where both sides run on."""
    shape, src_strides, dst_strides = coalesced(move.shape, move.src_strides, move.dst_strides)
    return move._replace(shape=shape, src_strides=src_strides, dst_strides=dst_strides)


def coalesced(
    shape: tuple[int, ...], src_strides: tuple[int, ...], dst_strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a copy with neighbouring axes merged where both sides run on."""
    merged: list[tuple[int, int, int]] = []
    for size, src, dst in zip(shape, src_strides, dst_strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == src * size and merged[-1][2] == dst * size:
            merged[-1] = (merged[-1][0] * size, src, dst)
        else:
            merged.append((size, src, dst))
    return tuple([d[0] for d in merged]), tuple([d[1] for d in merged]), tuple([d[2] for d in merged])


def clip(move: Move, low: int, high: int) -> Iterator[Move]:
    """The parts of a copy whose target elements lie in [low, high)."""
    span = move.dst_offset + sum((n - 1) * s for n, s in zip(move.shape, move.dst_strides, strict=True)) + 1
    if move.dst_offset >= low and span <= high:
        yield move
        return
    if move.dst_offset >= high or span <= low:
        return
    if len(move.shape) == 2 and (rows := _whole_rows(move, low, high)) is not None:
        first, last = rows
        yield move._replace(
            shape=(last - first, move.shape[1]),
            src_offset=move.src_offset + first * move.src_strides[0],
            dst_offset=move.dst_offset + first * move.dst_strides[0],
        )
        return
    extents = [
        (str(at), stride, size) for at, (size, stride) in enumerate(zip(move.shape, move.dst_strides, strict=True))
    ]
    for box in nested_boxes(extents, low - move.dst_offset, high - move.dst_offset):
        starts = [box[str(at)][0] for at in range(len(move.shape))]
        yield move._replace(
            shape=tuple(box[str(at)][1] - box[str(at)][0] for at in range(len(move.shape))),
            src_offset=move.src_offset + sum(i * s for i, s in zip(starts, move.src_strides, strict=True)),
            dst_offset=move.dst_offset + sum(i * s for i, s in zip(starts, move.dst_strides, strict=True)),
        )


def _whole_rows(move: Move, low: int, high: int) -> tuple[int, int] | None:
    """The rows [first, last) of a block of columns in [low, high), where these bounds cut no row of the block."""
    (count, size), (step, inner) = move.shape, move.dst_strides
    if inner != 1 or size > step:
        return None
    (first, before), (last, behind) = divmod(low - move.dst_offset, step), divmod(high - move.dst_offset, step)
    # a bound may lie between two rows: behind the `size` elements of one and before those of the next
    if 0 < before < size or 0 < behind < size:
        return None
    first, last = max(first + (before > 0), 0), min(last + (behind > 0), count)
    return (first, last) if first < last else None


class Sources:
    """Source files, opened once and read from by all threads."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, file: str) -> int:
        """The file's descriptor; CheckpointError when it cannot be opened."""
        found = self._descriptors.get(file)
        if found is None:
            with self._lock:
                found = self._descriptors.get(file)
                if found is None:
                    try:
                        found = os.open(file, os.O_RDONLY)
                    except OSError as error:
                        raise unreadable(file, reason(error)) from error
                    self._descriptors[file] = found
        return found

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class Workspace:
    """The buffers of one worker thread, and the source files that it reads: its own, or those that threads share."""

    def __init__(self, sources: Sources | None = None) -> None:
        self.bytes_read = 0
        self._sources = sources or Sources()
        self._own = sources is None
        self._buffers: dict[str, memoryview] = {}
        self._rows: dict[tuple[str, int, int, int, int], list[memoryview]] = {}
        self._once: tuple[str, int, int] | None = None
        self.kept: dict[str, tuple[Any, Any]] = {}  # by name: what for, and what was computed for it last

    def descriptor(self, file: str) -> int:
        """A source file's descriptor; CheckpointError when it cannot be opened."""
        return self._sources.descriptor(file)

    def buffer(self, name: str, size: int) -> memoryview:
        """A reused buffer of at least `size` bytes, as a view of exactly that many."""
        held = self._buffers.get(name)
        if held is None or len(held) < size:
            held = self._buffers[name] = buffers.buffer(size)
            self._rows.clear()
        return held[:size]

    def rows(self, name: str, start: int, count: int, size: int, stride: int) -> list[memoryview]:
        """Views of `count` rows of a buffer, `size` bytes each and `stride` apart, kept for the next time."""
        key = (name, start, count, size, stride)
        found = self._rows.get(key)
        if found is None:
            if len(self._rows) >= KEPT_ROWS:
                self._rows.clear()
            held = self._buffers[name]
            found = [held[at : at + size] for at in range(start, start + count * stride, stride)]
            self._rows[key] = found
        return found

    def read_into(self, file: str, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a file from `offset` on; CheckpointError when the file ends before."""
        descriptor = self._sources.descriptor(file)
        done = os.preadv(descriptor, (target,), offset)
        while done < len(target):
            count = os.preadv(descriptor, (target[done:],), offset + done)
            if count == 0:
                raise cut_off(file, offset + len(target), offset + done)
            done += count
        self.bytes_read += done

    def read(self, file: str, offset: int, size: int) -> memoryview:
        """Bytes of a file, in a buffer that holds them until the next call."""
        held = self.buffer("span", size)
        self.read_into(file, offset, held)
        return held

    def holds(self, file: str, offset: int, size: int) -> bool:
        """Whether these bytes are what `read_once` has read last."""
        return self._once == (file, offset, size)

    def read_once(self, file: str, offset: int, size: int) -> memoryview:
        """Bytes of a file, in a buffer of their own; they are not read again where they were the last."""
        held = self.buffer("once", size)
        if not self.holds(file, offset, size):
            self._once = None  # until they are there
            self.read_into(file, offset, held)
            self._once = file, offset, size
        return held

    def read_rows(self, file: str, offset: int, rows: Sequence[memoryview], size: int) -> None:
        """Fill views, `size` bytes in all, one after the other with the bytes of a file from `offset` on."""
        descriptor = self._sources.descriptor(file)
        for start in range(0, len(rows), IOV_MAX):
            group = rows
            if len(rows) > IOV_MAX:
                group = rows[start : start + IOV_MAX]
                size = sum(map(len, group))
            done = os.preadv(descriptor, group, offset)
            self.bytes_read += done
            at = 0
            for row in group if done < size else ():  # the end of the file, or the kernel gave less at once
                held = min(max(done - at, 0), len(row))
                if held < len(row):
                    self.read_into(file, offset + at + held, row[held:])
                at += len(row)
            offset += size

    def close(self) -> None:
        """Close the source files, unless other threads share them."""
        if self._own:
            self._sources.close()


def fill_tile(work: Workspace, moves: Sequence[Move], tile: memoryview, low: int, dtype: str) -> None:
    """Put the parts of `moves` that fall into a tile into it.

    `tile` is the workspace's buffer of that name and holds the target's elements from number `low` on. Where a source
    has another dtype than the target, each element is converted on its way (rounded once, to nearest even).
    """
    width = ITEMSIZE[dtype]
    for move in moves:
        for part in clip(move, low, low + len(tile) // width):
            if part.values is None and part.dtype == dtype and _moved(work, part, tile, low):
                continue
            if not look_up(work, part, tile, low, dtype):
                _rearranged(work, part, tile, low, dtype)


def _moved(work: Workspace, part: Move, tile: memoryview, low: int) -> bool:
    """Place a part by reading alone, where its rows are long enough; whether that was done."""
    width = ITEMSIZE[part.dtype]
    (file, start, _, _, src_offset, _, dst_offset, _, _) = part
    shape, src_strides, dst_strides = coalesced(part.shape, part.src_strides, part.dst_strides)
    source, at = start + src_offset * width, (dst_offset - low) * width
    if not shape:
        shape, src_strides, dst_strides = (1,), (1,), (1,)
    if src_strides[-1] != 1 or dst_strides[-1] != 1 or len(shape) > 2:
        return False
    size = shape[-1] * width
    if len(shape) == 1:
        work.read_into(file, source, tile[at : at + size])
        return True
    count, src, dst = shape[0], src_strides[0] * width, dst_strides[0] * width
    if size < ROW_BYTES or src < size:
        return False
    rows = work.rows("tile", at, count, size, dst)
    if src == size:
        work.read_rows(file, source, rows, count * size)
    elif src - size <= GAP_BYTES:
        gap = work.buffer("gap", GAP_BYTES)[: src - size]
        views = [view for row in rows for view in (row, gap)][:-1]
        work.read_rows(file, source, views, (count - 1) * src + size)
    else:
        for number, row in enumerate(rows):
            work.read_into(file, source + number * src, row)
    return True


def _rearranged(work: Workspace, part: Move, tile: memoryview, low: int, dtype: str) -> None:
    """Place a part element by element."""
    np = numpy()
    same = part.dtype == dtype and part.values is None
    kind = numpy_dtype(part.dtype, values=not same)
    target = np.frombuffer(tile, numpy_dtype(dtype, values=not same))
    for piece in _readable(part, kind.itemsize):
        view = np.lib.stride_tricks.as_strided(
            target[piece.dst_offset - low :],
            piece.shape,
            tuple(s * target.itemsize for s in piece.dst_strides),
        )
        span = 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.src_strides, strict=True))
        if piece.values is None:
            start = piece.start + piece.src_offset * kind.itemsize
            source = np.frombuffer(work.read(piece.file, start, span * kind.itemsize), kind)
        else:
            with np.errstate(all="ignore"):
                source = read_values(piece.values, piece.src_offset, span, work.read)
        elements = np.lib.stride_tricks.as_strided(
            source, piece.shape, tuple(s * source.itemsize for s in piece.src_strides)
        )
        with np.errstate(all="ignore"):  # what the new dtype cannot hold is told of by who looks at what is written
            np.copyto(view, elements, casting="unsafe")


def _readable(part: Move, width: int) -> Iterator[Move]:
    """A copy cut along its widest source axis until reading the whole span of each piece is worth it."""
    span = 1 + sum((n - 1) * s for n, s in zip(part.shape, part.src_strides, strict=True))
    volume = prod(n for n, s in zip(part.shape, part.src_strides, strict=True) if s)
    small = span <= SPAN_FACTOR * volume and span * width <= SPAN_FACTOR * TILE_BYTES
    if small or prod(part.shape) == 1:
        yield part
        return
    axis = max(range(len(part.shape)), key=lambda at: (part.shape[at] > 1, part.src_strides[at]))
    # halves rather than single indices: dense parts stay whole
    half = part.shape[axis] // 2
    for start, size in ((0, half), (half, part.shape[axis] - half)):
        shape = tuple(size if at == axis else n for at, n in enumerate(part.shape))
        yield from _readable(
            part._replace(
                shape=shape,
                src_offset=part.src_offset + start * part.src_strides[axis],
                dst_offset=part.dst_offset + start * part.dst_strides[axis],
            ),
            width,
        )


def tiles(high: int, width: int, low: int = 0, row: int = 1) -> Iterator[tuple[int, int]]:
    """The ranges in which elements [low, high) are written, in order; whole rows of `row` where a tile has room."""
    step = max(1, TILE_BYTES // width)
    if row < step:
        step -= step % row
    for start in range(low, high, step):
        yield start, min(start + step, high)
