"""One thread: its buffers, and how it does a unit of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from msgspec import Struct

from shardtool.execute import tiles as tiling
from shardtool.execute.assemble import assemble
from shardtool.execute.checksum import crc32
from shardtool.execute.files import Files
from shardtool.execute.finite import Passing
from shardtool.execute.lookup import rows_at_once, shared_rows
from shardtool.execute.lower import Run, Task, moves, runs
from shardtool.execute.stream import Progress, Stream
from shardtool.execute.tiles import Move, Sources, Workspace
from shardtool.execute.units import Part, Unit
from shardtool.formats.stored import ITEMSIZE, Stored
from shardtool.layout.layout import Key

RUN_BYTES = 64 << 10  # strided copies of shorter runs than this are assembled in tiles
KEPT_VECTORS = 4  # layouts of a scatter that a worker keeps


class Watch(Struct, frozen=True):
    """Who is told of tasks whose values are no numbers; `moved`: also where values are not changed."""

    tell: Callable[[Task], None]
    moved: bool


class Worker:
    """One thread's buffers, and what it does with a unit."""

    def __init__(
        self,
        number: int,
        files: Files,
        sources: Sources,
        locate: Callable[[Key], Stored],
        fills: Mapping[Key, bytes],
        progress: Progress | None,
        watch: Watch | None,
    ) -> None:
        self.space = Workspace(sources)
        self._number, self._files, self._locate = number, files, locate
        self._fills, self._progress, self._watch = fills, progress, watch
        self._runs: dict[tuple[int, str], list[Run] | None] = {}
        self._vectors: dict[Any, tuple[int, list[memoryview], list[memoryview]]] = {}

    def run(self, unit: Unit) -> None:
        """Do it."""
        if unit.scatter:
            self._scatter(unit.parts)
            return
        stream = Stream(self.space, self._files, unit.files[0], self._progress)
        for part in unit.parts:
            self._one(stream, part)
        stream.flush()
        first, last = unit.parts[0], unit.parts[-1]
        self._files.written(first.file, first.payload.offset + first.low, last.payload.offset + last.high)

    def _one(self, stream: Stream, part: Part) -> None:
        """One part of a tensor, and what follows the tensor in the file when it is complete."""
        task, payload = part.task, part.payload
        stream.seek(payload.offset + part.low)
        found = moves(task, self._locate)
        passing = self._passing(task, found)
        pieces = None if task.key in self._fills else self._pieces(task, found)
        stream.begin(bool(payload.crc_at) and not (pieces and self._files.unread), passing)
        if pieces is not None:
            self._run(stream, found, pieces, part)
        else:
            width = ITEMSIZE[task.dtype]
            row = self._fills.get(task.key)
            for low, tile in assemble(self.space, task, found, row, part.low // width, part.high // width):
                stream.write(tile, payload.offset + low * width)
        self._complete(stream, part, passing)

    def _complete(self, stream: Stream, part: Part, passing: Passing | None) -> None:
        """Behind the last byte of a part: its checksum, and what follows the tensor in the file."""
        payload = part.payload
        behind = self._behind(part, stream.end())
        self._tell(part.task, passing)
        if behind and part.high == payload.nbytes:
            stream.put(behind)
        elif behind:
            self._files.write(part.file, behind, payload.offset + payload.nbytes)

    def _passing(self, task: Task, found: Sequence[Move]) -> Passing | None:
        """Who looks at a task's values, if anybody does."""
        watch = self._watch
        if watch is None:
            return None
        if not watch.moved and all(move.values is None and move.dtype == task.dtype for move in found):
            return None
        return Passing(task.dtype)

    def _tell(self, task: Task, passing: Passing | None) -> None:
        if passing is not None and passing.found and self._watch is not None:
            self._watch.tell(task)

    def _pieces(self, task: Task, found: list[Move]) -> list[Run] | None:
        """The runs of a task; tensors of one piece have the same, unless their sources are laid out differently."""
        key = (id(task.sources), task.dtype)
        sources = task.sources
        alike = len(found) == len(sources) and all(
            move.src_strides is source.src_strides and move.dtype == task.dtype and move.values is None
            for move, source in zip(found, sources, strict=True)
        )
        if not alike:
            return runs(found, task.dtype, prod(task.shape), RUN_BYTES)
        if key not in self._runs:
            self._runs[key] = runs(found, task.dtype, prod(task.shape), RUN_BYTES)
        return self._runs[key]

    def _run(self, stream: Stream, found: list[Move], pieces: list[Run], part: Part) -> None:
        at, width = 0, ITEMSIZE[part.task.dtype]
        take = stream.share if self._files.shares else stream.read
        for number, start, size in pieces:
            low, high = max(at, part.low), min(at + size, part.high)
            if low < high:
                if number < 0:
                    stream.zeros(high - low)
                else:
                    move = found[number]
                    take(move.file, move.start + move.src_offset * width + start + low - at, high - low)
            at += size
            if at >= part.high:
                break

    def _behind(self, part: Part, crc: int) -> bytearray | None:
        """Note a part's checksum; after the last part, what follows the tensor in its file, to be written there."""
        payload, files = part.payload, self._files
        if part.shared is not None:
            whole = part.shared.add(part.low, crc, part.high - part.low)
            if whole is None:
                return None
            crc = whole
        end = payload.offset + payload.nbytes
        behind = bytearray(files.take(part.file, end) or b"")
        for at in payload.crc_at:
            if end <= at <= end + len(behind) - 4:
                behind[at - end : at - end + 4] = crc.to_bytes(4, "little")
            else:
                files.patch(part.file, crc.to_bytes(4, "little"), at)
        return behind

    def _scatter(self, parts: tuple[Part, ...]) -> None:
        """Columns of one matrix for several targets, read once where that is possible."""
        found = [moves(part.task, self._locate) for part in parts]
        if (stored := shared_rows(found, parts[0].task.dtype)) is not None:
            self._abreast(parts, found, stored)
        elif (block := _block(parts, found)) is not None:
            self._columns(parts, block)
        else:
            for part in parts:
                stream = Stream(self.space, self._files, part.file, self._progress)
                self._one(stream, part)
                stream.flush()

    def _columns(self, parts: tuple[Part, ...], block: _Block) -> None:
        """Read each block of rows once and write its column blocks to all targets."""
        step, regions, rows = self._vector(block)
        crcs = [0] * len(regions)
        passing = self._passing(parts[0].task, ())
        used = list(enumerate(zip(parts, block.used, strict=True)))
        turn = used[self._number % len(used) :] + used[: self._number % len(used)]  # not all workers at one file
        checked = any(part.payload.crc_at for part in parts)
        first = block.columns[block.used[0]][1]
        for row in range(parts[0].low // first, parts[0].high // first, step):
            count = min(step, parts[0].high // first - row)
            views = rows if count == step else rows[: count * (len(rows) // step)]
            if block.behind:  # behind the last column of the last row the file may end
                views = views[:-1]
            self.space.read_rows(block.file, block.start + row * block.row, views, count * block.row - block.behind)
            for at, (region, (_, size)) in enumerate(zip(regions, block.columns, strict=True)):
                if checked:
                    crcs[at] = crc32(region[: count * size], crcs[at])
                if passing is not None:
                    passing.see(region[: count * size])
            self._tell(parts[0].task, passing)
            for _, (part, at) in turn:
                size = block.columns[at][1]
                data = regions[at][: count * size]
                low = row * size
                if low + len(data) == part.high:
                    self._last(part, data, low, crcs[at])
                else:
                    self._files.write(part.file, data, part.payload.offset + low)
                if self._progress:
                    self._progress(len(data), part.file)
        for part in parts:
            self._files.written(part.file, part.payload.offset + part.low, part.payload.offset + part.high)

    def _abreast(self, parts: tuple[Part, ...], found: list[list[Move]], stored: Stored) -> None:
        """Read some rows of an FP8 matrix once and compute the columns of each target from them, then the next rows."""
        origin, width = found[0][0].src_offset // stored.shape[-1], stored.shape[-1]
        sizes = [move.shape[1] * ITEMSIZE[part.task.dtype] for part, (move,) in zip(parts, found, strict=True)]
        step = rows_at_once(stored, max(sizes), tiling.TILE_BYTES)
        passings = [self._passing(part.task, moved) for part, moved in zip(parts, found, strict=True)]
        streams = [Stream(self.space, self._files, part.file, self._progress) for part in parts]
        for part, stream, passing in zip(parts, streams, passings, strict=True):
            stream.begin(bool(part.payload.crc_at), passing)
        end = parts[0].high // sizes[0]
        for row in range(parts[0].low // sizes[0], end, step):
            count = min(step, end - row)
            self.space.read_once(stored.file, stored.offset + (origin + row) * width, count * width)
            for part, stream, moved, size in zip(parts, streams, found, sizes, strict=True):
                item = ITEMSIZE[part.task.dtype]
                low, high = row * size // item, (row + count) * size // item
                for at, tile in assemble(self.space, part.task, moved, None, low, high):
                    stream.write(tile, part.payload.offset + at * item)
        for part, stream, passing in zip(parts, streams, passings, strict=True):
            self._complete(stream, part, passing)
            stream.flush()
            self._files.written(part.file, part.payload.offset + part.low, part.payload.offset + part.high)

    def _last(self, part: Part, data: memoryview, low: int, crc: int) -> None:
        """Write the last bytes of a part, and with them what follows the tensor in its file when it is complete."""
        behind = self._behind(part, crc)
        offset = part.payload.offset + low
        if behind and part.high == part.payload.nbytes:
            self._files.write_both(part.file, data, behind, offset)
            return
        self._files.write(part.file, data, offset)
        if behind:
            self._files.write(part.file, behind, part.payload.offset + part.payload.nbytes)

    def _vector(self, block: _Block) -> tuple[int, list[memoryview], list[memoryview]]:
        """How many rows are read at once, a buffer for each block of columns, and the views that one preadv fills."""
        key = (block.columns, block.row)
        known = self._vectors.get(key)
        if known is not None:
            return known
        pieces: list[tuple[int, int]] = []  # size, number of the columns or -1
        at = 0
        for number, (low, size) in enumerate(block.columns):
            pieces += [(low - at, -1), (size, number)] if low > at else [(size, number)]
            at = low + size
        pieces += [(block.row - at, -1)] if at < block.row else []
        step = max(1, min(tiling.TILE_BYTES * 2 // block.row, tiling.IOV_MAX // len(pieces)))
        gap = self.space.buffer("gap", max(tiling.GAP_BYTES, block.row))
        buffer = self.space.buffer("rows", max(step * block.row, 2 * tiling.TILE_BYTES))
        regions, begin = [], 0
        for _, size in block.columns:
            regions.append(buffer[begin : begin + step * size])
            begin += step * size
        rows = [
            gap[:size] if number < 0 else regions[number][row * size : row * size + size]
            for row in range(step)
            for size, number in pieces
        ]
        if len(self._vectors) >= KEPT_VECTORS:
            self._vectors.clear()
        self._vectors[key] = (step, regions, rows)
        return step, regions, rows


class _Block(Struct, frozen=True):
    """Rows of `row` bytes at `start` of a file, and blocks of columns of it, (first byte, size) in order.

    `used` has the number of the columns that each target takes; several may take the same. `behind` bytes follow the
    last columns in a row.
    """

    file: str
    start: int
    row: int
    columns: tuple[tuple[int, int], ...]
    used: tuple[int, ...]
    behind: int


def _block(parts: Sequence[Part], found: list[list[Move]]) -> _Block | None:
    """The columns of one matrix that go to these targets; None when the sources are not laid out like that."""
    width, first = ITEMSIZE[parts[0].task.dtype], found[0][0]
    if len(first.shape) != 2:
        return None
    rows, stride = first.shape[0], first.src_strides[0]
    origin = first.src_offset // stride
    for part, (move,) in zip(parts, found, strict=True):
        if (
            move.dtype != part.task.dtype
            or move.values is not None
            or move[:3] != first[:3]
            or move.shape[0] != rows
            or move.src_strides != (stride, 1)
            or move.src_offset // stride != origin
            or move.src_offset % stride + move.shape[1] > stride
        ):
            return None
    taken = [(move.src_offset % stride * width, move.shape[1] * width) for (move,) in found]
    columns = tuple(sorted(set(taken)))
    if any(low + size > following for (low, size), (following, _) in pairwise(columns)):
        return None
    if stride * width > 4 * tiling.TILE_BYTES or 2 * len(columns) + 1 > tiling.IOV_MAX:
        return None
    used = tuple(columns.index(column) for column in taken)
    behind = stride * width - sum(columns[-1])
    return _Block(first.file, first.start + origin * stride * width, stride * width, columns, used, behind)
