"""What is to be done, in units that a worker takes at once, in the order of the sources on disk."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

from msgspec import Struct

from shardtool.execute.checksum import combine
from shardtool.execute.lower import Task, source_keys
from shardtool.formats.stored import ITEMSIZE, Payload, Stored
from shardtool.layout.layout import Key

Place = tuple[str, int]

UNIT_BYTES = 8 << 20  # what a worker takes at once: small enough to balance, large enough to write in order
PART_BYTES = 32 << 20  # larger tensors are cut, so that several workers share them


class Shared:
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


Item = tuple[Task, str, Payload]  # a task, its file and its place there


class Part(Struct, frozen=True):
    """Bytes [low, high) of a task's tensor, and its place; `shared` where there are other parts."""

    task: Task
    file: str
    payload: Payload
    low: int
    high: int
    shared: Shared | None


class Unit(Struct, frozen=True):
    """What a worker does at once: parts of one file, one after the other, or a scatter to several files."""

    parts: tuple[Part, ...]
    files: tuple[str, ...]
    scatter: bool


def first_places(
    work: Sequence[Item], locate: Callable[[Key], Stored], place: Callable[[Key], Place] | None = None
) -> dict[str, Place]:
    """Of each target file, the first place in the sources that it takes something from."""
    found: dict[str, Place] = {}
    for item in work:
        first = _first_place([item], locate, place)
        if first < found.get(item[1], (first[0] + "~", 0)):
            found[item[1]] = first
    return found


def units(
    work: Sequence[Item],
    locate: Callable[[Key], Stored],
    place: Callable[[Key], Place] | None,
    fills: Mapping[Key, bytes],
) -> list[Unit]:
    """The work in the order of the sources on disk, cut into units."""
    groups: dict[tuple[int, tuple[int, ...]], list[Item]] = defaultdict(list)
    for item in work:
        groups[item[0].piece.rule, item[0].ids].append(item)
    in_turn = sorted(groups.values(), key=lambda group: _first_place(group, locate, place))
    made: list[Unit] = []
    waiting: dict[str, list[Part]] = defaultdict(list)
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


def _in_file(parts: list[Part]) -> Unit:
    parts.sort(key=lambda part: part.payload.offset + part.low)
    return Unit(tuple(parts), (parts[0].file,), False)


def _first_place(group: list[Item], locate: Callable[[Key], Stored], place: Callable[[Key], Place] | None) -> Place:
    for task, _, _ in group:
        for key in source_keys(task):
            if place is not None:
                return place(key)
            stored = locate(key)
            return stored.file, stored.offset
    return "", 0


def _scatters(group: list[Item], fills: Mapping[Key, bytes]) -> list[list[Item]]:
    """Those of the tensors that are one block of columns of the same source matrix, all rows of it."""
    by_source: dict[int, list[Item]] = defaultdict(list)
    for item in group:
        task = item[0]
        if len(task.sources) == 1 and task.sources[0].columns and task.key not in fills:
            source = task.sources[0]
            if prod(source.shape) == prod(task.shape) and source.copy.dst_offset == 0:
                by_source[id(source.copy.src)].append(item)
    return [held for held in by_source.values() if len(held) > 1]


def _scattered(held: list[Item]) -> Iterator[Unit]:
    """Tensors that are columns of one matrix, cut into units by rows."""
    rows = held[0][0].sources[0].shape[0]
    sizes = [payload.nbytes for _, _, payload in held]
    step = -(-rows // min(rows, -(-sum(sizes) // PART_BYTES)))
    parts = [_cut(item, size // rows * step, size) for item, size in zip(held, sizes, strict=True)]
    files = tuple(dict.fromkeys(file for _, file, _ in held))
    for together in zip(*parts, strict=True):
        yield Unit(together, files, True)


def _parts(item: Item) -> list[Part]:
    """A tensor in parts of whole rows."""
    payload = item[2]
    size = payload.nbytes
    if size <= PART_BYTES:
        return [Part(*item, 0, size, None)]
    row = payload.shape[-1] * ITEMSIZE[payload.dtype]
    return _cut(item, max(row, PART_BYTES - PART_BYTES % row), size)


def _cut(item: Item, step: int, size: int) -> list[Part]:
    if step >= size:
        return [Part(*item, 0, size, None)]
    shared = Shared(-(-size // step))
    return [Part(*item, low, min(low + step, size), shared) for low in range(0, size, step)]
