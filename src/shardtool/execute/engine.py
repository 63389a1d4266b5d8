"""The engine: a plan and two sets of byte places become files, or a comparison.

A plan is lowered to three kinds of work on byte ranges: *runs* (contiguous bytes, gathered with what lies between them
in the target file into large aligned writes), *scatters* (blocks of rows of a source matrix are read once and their
columns go to several targets), and *tiles* (anything else: strided, transposed or converted elements, assembled in a
buffer). Memory is workers x a few buffers, whatever the size of the model. No torch.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import prod
from typing import Any, NamedTuple

from shardtool.execute import tiles as tiling
from shardtool.execute.checksum import combine, crc32
from shardtool.execute.codecs import Values
from shardtool.execute.files import Files
from shardtool.execute.lower import Run, Task, moves, runs, source_keys, tasks
from shardtool.execute.tiles import Move, Sources, Workspace, clip, fill_tile, tiles
from shardtool.formats.stored import ITEMSIZE, Payload, Stored, row_major_strides
from shardtool.layout.layout import Key
from shardtool.plan.plan import Plan

__all__ = [
    "Difference",
    "Files",
    "Progress",
    "Task",
    "Traffic",
    "assemble",
    "compare",
    "first_places",
    "moves",
    "tasks",
    "write",
]

Progress = Callable[[int, str], None]  # bytes of the target that are done, and the file
Place = tuple[str, int]

UNIT_BYTES = 8 << 20  # what a worker takes at once: small enough to balance, large enough to write in order
PART_BYTES = 32 << 20  # larger tensors are cut, so that several workers share them
RUN_BYTES = 64 << 10  # strided copies of shorter runs than this are assembled in tiles
KEPT_VECTORS = 4  # layouts of a scatter that a worker keeps
SLACK = 64 << 10  # room behind a tile for what follows a payload in its file


class Traffic(NamedTuple):
    """Bytes of payload that a run has read (more than once where that was cheaper) and written."""

    read: int
    written: int


class _Shared:
    """A tensor that is written in parts: its checksum is known when the last part is there."""

    __slots__ = ("crcs", "left", "lock")

    def __init__(self, parts: int) -> None:
        self.left, self.crcs, self.lock = parts, dict[int, tuple[int, int]](), threading.Lock()

    def add(self, low: int, crc: int, size: int) -> int | None:
        """Add a part's checksum; that of the whole tensor when it was the last part."""
        with self.lock:
            self.crcs[low] = (crc, size)
            self.left -= 1
            if self.left:
                return None
        whole = 0
        for _, (part, length) in sorted(self.crcs.items()):
            whole = combine(whole, part, length)
        return whole


_Item = tuple[Task, str, Payload]


class _Part(NamedTuple):
    """Bytes [low, high) of a task's tensor, and its place; `shared` where there are other parts."""

    task: Task
    file: str
    payload: Payload
    low: int
    high: int
    shared: _Shared | None


class _Unit(NamedTuple):
    """What a worker does at once: parts of one file, one after the other, or a scatter to several files."""

    parts: tuple[_Part, ...]
    files: tuple[str, ...]
    scatter: bool


def write(
    work: Sequence[_Item],
    files: Files,
    locate: Callable[[Key], Stored],
    *,
    fills: Mapping[Key, bytes] | None = None,
    jobs: int = 2,
    progress: Progress | None = None,
    place: Callable[[Key], Place] | None = None,
) -> Traffic:
    """Write every task's tensor to its payload's place, and finish the files.

    `fills` gives the bytes of one padding row of a tensor where padding is not zeros, `place` the file and offset of a
    source tensor, near enough to put the work in the order of the disk (default: `locate`).
    """
    sources = Sources()
    queue = _Queue(_units(work, locate, place, fills or {}), files)
    workers = [_Worker(number, files, sources, locate, fills or {}, progress) for number in range(max(1, jobs))]
    threads = [threading.Thread(target=queue.serve, args=(worker,), name="worker") for worker in workers[1:]]
    try:
        for thread in threads:
            thread.start()
        queue.serve(workers[0])
        while any(thread.is_alive() for thread in threads):
            try:
                for thread in threads:
                    thread.join()
            except KeyboardInterrupt as error:
                queue.stop(error)
    finally:
        sources.close()
    if queue.error is not None:
        raise queue.error
    return Traffic(sum(worker.space.bytes_read for worker in workers), sum(payload.nbytes for _, _, payload in work))


def first_places(
    work: Sequence[_Item], locate: Callable[[Key], Stored], place: Callable[[Key], Place] | None = None
) -> dict[str, Place]:
    """Of each target file, the first place in the sources that it takes something from."""
    found: dict[str, Place] = {}
    for item in work:
        first = _first_place([item], locate, place)
        if first < found.get(item[1], (first[0] + "~", 0)):
            found[item[1]] = first
    return found


# --- what is to be done ----------------------------------------------------------------------------------------------


def _units(
    work: Sequence[_Item],
    locate: Callable[[Key], Stored],
    place: Callable[[Key], Place] | None,
    fills: Mapping[Key, bytes],
) -> list[_Unit]:
    """The work in the order of the sources on disk, cut into units."""
    groups: dict[tuple[int, tuple[int, ...]], list[_Item]] = defaultdict(list)
    for item in work:
        groups[item[0].piece.rule, item[0].ids].append(item)
    in_turn = sorted(groups.values(), key=lambda group: _first_place(group, locate, place))
    made: list[_Unit] = []
    waiting: dict[str, list[_Part]] = defaultdict(list)
    size: dict[str, int] = defaultdict(int)
    for group in in_turn:
        scatters = _scatters(group, fills) if len(group) > 1 else []
        together = {id(item[0]) for held in scatters for item in held}
        for item in group:
            for part in _parts(item) if id(item[0]) not in together else ():
                waiting[part.file].append(part)
                size[part.file] += part.high - part.low
                if size[part.file] >= UNIT_BYTES:
                    made.append(_in_file(waiting.pop(part.file)))
                    size[part.file] = 0
        for held in scatters:
            made += _scattered(held)
    return made + [_in_file(parts) for parts in waiting.values()]


def _in_file(parts: list[_Part]) -> _Unit:
    parts.sort(key=lambda part: part.payload.offset + part.low)
    return _Unit(tuple(parts), (parts[0].file,), False)


def _first_place(group: list[_Item], locate: Callable[[Key], Stored], place: Callable[[Key], Place] | None) -> Place:
    for task, _, _ in group:
        for key in source_keys(task):
            if place is not None:
                return place(key)
            stored = locate(key)
            return stored.file, stored.offset
    return "", 0


def _scatters(group: list[_Item], fills: Mapping[Key, bytes]) -> list[list[_Item]]:
    """Those of the tensors that are one block of columns of the same source matrix, all rows of it."""
    by_source: dict[int, list[_Item]] = defaultdict(list)
    for item in group:
        task = item[0]
        if len(task.sources) == 1 and task.sources[0].columns and task.key not in fills:
            source = task.sources[0]
            if prod(source.shape) == prod(task.shape) and source.copy.dst_offset == 0:
                by_source[id(source.copy.src)].append(item)
    return [held for held in by_source.values() if len(held) > 1]


def _scattered(held: list[_Item]) -> Iterator[_Unit]:
    """Tensors that are columns of one matrix, cut into units by rows."""
    rows = held[0][0].sources[0].shape[0]
    sizes = [payload.nbytes for _, _, payload in held]
    step = -(-rows // min(rows, -(-sum(sizes) // PART_BYTES)))
    parts = [_cut(item, size // rows * step, size) for item, size in zip(held, sizes, strict=True)]
    files = tuple(dict.fromkeys(file for _, file, _ in held))
    for together in zip(*parts, strict=True):
        yield _Unit(together, files, True)


def _parts(item: _Item) -> list[_Part]:
    """A tensor in parts of whole rows."""
    payload = item[2]
    size = payload.nbytes
    if size <= PART_BYTES:
        return [_Part(*item, 0, size, None)]
    row = payload.shape[-1] * ITEMSIZE[payload.dtype]
    return _cut(item, max(row, PART_BYTES - PART_BYTES % row), size)


def _cut(item: _Item, step: int, size: int) -> list[_Part]:
    if step >= size:
        return [_Part(*item, 0, size, None)]
    shared = _Shared(-(-size // step))
    return [_Part(*item, low, min(low + step, size), shared) for low in range(0, size, step)]


class _Queue:
    """The units that are left, and who writes to which file: a worker gets the next unit of the quietest file."""

    def __init__(self, units: list[_Unit], files: Files) -> None:
        self.error: BaseException | None = None
        self._units = units[::-1]
        self._files = files
        self._lock = threading.Lock()
        self._writers: dict[str, int] = defaultdict(int)
        self._left: dict[str, int] = defaultdict(int)  # units per file
        for unit in units:
            for file in unit.files:
                self._left[file] += 1
        self._look = 64

    def serve(self, worker: _Worker) -> None:
        """Work until nothing is left, or until another worker failed."""
        try:
            while (unit := self._take()) is not None:
                worker.run(unit)
                self._done(unit)
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        """Let no further unit begin; the first error is kept."""
        with self._lock:
            self.error = self.error or error

    def _take(self) -> _Unit | None:
        with self._lock:
            if self.error is not None or not self._units:
                return None
            best, least = -1, -1.0
            for at in range(len(self._units) - 1, max(-1, len(self._units) - 1 - self._look), -1):
                files = self._units[at].files
                busy = sum(self._writers[file] for file in files) / len(files)
                if best < 0 or busy < least:
                    best, least = at, busy
                if not busy:
                    break
            unit = self._units.pop(best)
            for file in unit.files:
                self._writers[file] += 1
            return unit

    def _done(self, unit: _Unit) -> None:
        complete = []
        with self._lock:
            for file in unit.files:
                self._writers[file] -= 1
                self._left[file] -= 1
                if not self._left[file]:
                    complete.append(file)
        for file in complete:
            self._files.finish(file)


# --- how it is done --------------------------------------------------------------------------------------------------


class _Worker:
    """One thread's buffers, and what it does with a unit."""

    def __init__(
        self,
        number: int,
        files: Files,
        sources: Sources,
        locate: Callable[[Key], Stored],
        fills: Mapping[Key, bytes],
        progress: Progress | None,
    ) -> None:
        self.space = Workspace(sources)
        self._number, self._files, self._locate = number, files, locate
        self._fills, self._progress = fills, progress
        self._runs: dict[tuple[int, str], list[Run] | None] = {}
        self._vectors: dict[Any, tuple[int, list[memoryview], list[memoryview]]] = {}

    def run(self, unit: _Unit) -> None:
        """Do it."""
        if unit.scatter:
            self._scatter(unit.parts)
            return
        stream = _Stream(self.space, self._files, unit.files[0], self._progress)
        for part in unit.parts:
            self._one(stream, part)
        stream.flush()
        first, last = unit.parts[0], unit.parts[-1]
        self._files.written(first.file, first.payload.offset + first.low, last.payload.offset + last.high)

    def _one(self, stream: _Stream, part: _Part) -> None:
        """One part of a tensor, and what follows the tensor in the file when it is complete."""
        task, payload = part.task, part.payload
        stream.seek(payload.offset + part.low)
        stream.begin(bool(payload.crc_at))
        found = moves(task, self._locate)
        pieces = None if task.key in self._fills else self._pieces(task, found)
        if pieces is not None:
            self._run(stream, found, pieces, part)
        else:
            width = ITEMSIZE[task.dtype]
            row = self._fills.get(task.key)
            for low, tile in assemble(self.space, task, found, row, part.low // width, part.high // width):
                stream.write(tile, payload.offset + low * width)
        behind = self._behind(part, stream.end())
        if behind and part.high == payload.nbytes:
            stream.put(behind)
        elif behind:
            self._files.write(part.file, behind, payload.offset + payload.nbytes)

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

    @staticmethod
    def _run(stream: _Stream, found: list[Move], pieces: list[Run], part: _Part) -> None:
        at, width = 0, ITEMSIZE[part.task.dtype]
        for number, start, size in pieces:
            low, high = max(at, part.low), min(at + size, part.high)
            if low < high:
                if number < 0:
                    stream.zeros(high - low)
                else:
                    move = found[number]
                    stream.read(move.file, move.start + move.src_offset * width + start + low - at, high - low)
            at += size
            if at >= part.high:
                break

    def _behind(self, part: _Part, crc: int) -> bytearray | None:
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

    def _scatter(self, parts: tuple[_Part, ...]) -> None:
        """Read each block of rows once and write its column blocks to all targets."""
        block = _block(parts, [moves(part.task, self._locate) for part in parts])
        if block is None:
            for part in parts:
                stream = _Stream(self.space, self._files, part.file, self._progress)
                self._one(stream, part)
                stream.flush()
            return
        step, regions, rows = self._vector(block)
        crcs = [0] * len(regions)
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
            if checked:
                for at, (region, (_, size)) in enumerate(zip(regions, block.columns, strict=True)):
                    crcs[at] = crc32(region[: count * size], crcs[at])
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

    def _last(self, part: _Part, data: memoryview, low: int, crc: int) -> None:
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


class _Block(NamedTuple):
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


def _block(parts: Sequence[_Part], found: list[list[Move]]) -> _Block | None:
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


class _Stream:
    """Bytes on their way into one file: gathered in a buffer, written in large pieces that end on multiples of it."""

    def __init__(self, space: Workspace, files: Files, name: str, progress: Progress | None) -> None:
        self._space, self._files, self._name, self._progress = space, files, name, progress
        self._tile = tiling.TILE_BYTES
        self._view = space.buffer("stream", self._tile + SLACK)
        self._base = self._fill = 0
        self._limit = self._tile
        self._crc, self._mark, self._checked = 0, 0, False
        self._payload = 0  # bytes of payload that are not yet reported

    def seek(self, offset: int) -> None:
        """The next bytes belong at this offset of the file."""
        if offset != self._base + self._fill:
            self.flush()
            self._base = offset
            self._limit = self._tile - offset % self._tile

    def begin(self, checked: bool) -> None:
        """What follows is one tensor's payload, with a checksum or without."""
        self._crc, self._mark, self._checked = 0, self._fill, checked

    def end(self) -> int:
        """The checksum since `begin`."""
        if self._checked and self._mark < self._fill:
            self._crc = crc32(self._view[self._mark : self._fill], self._crc)
        self._checked = False
        return self._crc

    def read(self, file: str, offset: int, size: int) -> None:
        """Bytes of a source file."""
        while size:
            count = min(size, self._limit - self._fill)
            if count > 0:
                self._space.read_into(file, offset, self._view[self._fill : self._fill + count])
                self._advance(count)
                offset += count
                size -= count
            if self._fill >= self._limit:
                self.flush()

    def zeros(self, size: int) -> None:
        """Padding."""
        while size:
            count = min(size, self._limit - self._fill)
            if count > 0:
                self._view[self._fill : self._fill + count] = bytes(count)
                self._advance(count)
                size -= count
            if self._fill >= self._limit:
                self.flush()

    def _advance(self, count: int) -> None:
        self._fill += count
        self._payload += count

    def write(self, data: memoryview, offset: int) -> None:
        """Payload that is in a buffer of its own already."""
        self.flush()
        if self._checked:
            self._crc = crc32(data, self._crc)
        self._files.write(self._name, data, offset)
        self._base = offset + len(data)
        self._limit = self._tile - self._base % self._tile
        self._payload += len(data)
        self._report()

    def put(self, data: bytearray) -> None:
        """Bytes that are no payload."""
        if self._fill + len(data) > len(self._view):
            self.flush()
        if len(data) > len(self._view):
            self._files.write(self._name, data, self._base)
            self._base += len(data)
            self._limit = self._tile - self._base % self._tile
            return
        self._view[self._fill : self._fill + len(data)] = data
        self._fill += len(data)

    def flush(self) -> None:
        """Write what has gathered."""
        if self._fill:
            if self._checked and self._mark < self._fill:
                self._crc = crc32(self._view[self._mark : self._fill], self._crc)
            self._mark = 0
            self._files.write(self._name, self._view[: self._fill], self._base)
            self._base += self._fill
            self._fill = 0
            self._limit = self._tile - self._base % self._tile
        self._report()

    def _report(self) -> None:
        if self._progress and self._payload:
            self._progress(self._payload, self._name)
        self._payload = 0


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
    block = pattern * max(1, SLACK // len(pattern))
    at, start = 0, low * width % len(pattern)
    while at < len(tile):
        piece = block[start : start + len(tile) - at]
        tile[at : at + len(piece)] = piece
        at, start = at + len(piece), 0


@dataclass(frozen=True, slots=True)
class Difference:
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
    """Whether two buffers begin with the same bytes, without a copy of either and without numpy."""
    return isinstance(tile.obj, bytearray) and tile.obj.startswith(other)


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
