"""A plan lowered to what is to be done: one task per target tensor, its copies with their sources found, byte runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from msgspec import Struct

from shardtool.execute.codecs import Change, Values, change
from shardtool.execute.tiles import Move, coalesced
from shardtool.formats.stored import ITEMSIZE, Stored, row_major_strides
from shardtool.layout.layout import Key, Piece
from shardtool.plan.copies import Copy, Loop, Plan

Ids = tuple[int, ...]


class Source(Struct, frozen=True):
    """A copy as all instances of its target piece share it: neighbouring axes merged, and how to find the source.

    `key` takes the source's ids, and `places` tells where these stand in the target's ids followed by those of the
    loops that the target's ids do not decide (`free`); `steps` what each of the target's ids adds to the offset;
    `change` what happens to the values. `imports`: from Hugging Face to Megatron.
    """

    copy: Copy
    shape: tuple[int, ...]
    src_strides: tuple[int, ...]
    dst_strides: tuple[int, ...]
    key: Callable[[Ids], Key]
    places: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    free: tuple[Loop, ...]
    change: Change | None
    imports: bool

    @property
    def columns(self) -> bool:
        """Whether it is a block of columns of a wider row-major matrix, dense in the target."""
        return (
            len(self.shape) == 2
            and self.src_strides[1] == 1
            and self.dst_strides == (self.shape[1], 1)
            and self.src_strides[0] > self.shape[1]
            and not self.free
            and self.change is None
        )


class Task(Struct, frozen=True):
    """One target tensor: its key and ids, and the copies that make its elements (the rest is padding)."""

    key: Key
    piece: Piece
    shape: tuple[int, ...]
    dtype: str
    ids: Ids
    sources: tuple[Source, ...]


def tasks(plan: Plan, dtype_of: Callable[[Key], str]) -> Iterator[Task]:
    """One task per target tensor, in the layout's order, expanded lazily."""
    by_piece: dict[int, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        by_piece[id(copy.dst)].append(copy)
    for piece in plan.dst.pieces:
        shape = plan.dst.shape(piece)
        imports = plan.src.side < plan.dst.side
        held = [(_source(copy, imports), _ids_of(copy)) for copy in by_piece[id(piece)]]
        everything = tuple(source for source, _ in held)
        whole = [frozenset(axis.ids) for axis in piece.names]
        all_alike = all(ids == whole for _, ids in held)
        chosen: dict[tuple[bool, ...], tuple[Source, ...]] = {}
        for ids, key in piece.keyed():
            sources = everything
            if not all_alike:
                which = tuple(all(i in s for i, s in zip(ids, sets, strict=True)) for _, sets in held)
                if which not in chosen:
                    chosen[which] = tuple(source for source, use in zip(everything, which, strict=True) if use)
                sources = chosen[which]
            yield Task(key, piece, shape, dtype_of(key), ids, sources)


def _ids_of(copy: Copy) -> list[frozenset[int]]:
    loops = {loop.axis: frozenset(loop.ids) for loop in copy.loops}
    return [loops[name.axis] for name in copy.dst.names]


def _source(copy: Copy, imports: bool) -> Source:
    fixed = [name.axis for name in copy.dst.names]
    free = tuple(loop for loop in copy.loops if loop.axis not in fixed)
    order = [*fixed, *(loop.axis for loop in free)]
    steps = tuple((fixed.index(loop.axis), loop.src_stride) for loop in copy.loops if loop.axis in fixed)
    shape, src_strides, dst_strides = coalesced(copy.shape, copy.src_strides, copy.dst_strides)
    places = tuple(order.index(name.axis) for name in copy.src.names)
    steps = tuple(step for step in steps if step[1])
    changed = change(*copy.codecs)
    return Source(copy, shape, src_strides, dst_strides, copy.src.keyer(), places, steps, free, changed, imports)


def source_keys(task: Task) -> Iterator[Key]:
    """The keys of the stored tensors that a task reads."""
    for source in task.sources:
        for chosen in product(*(loop.ids for loop in source.free)):
            ids = (*task.ids, *chosen)
            yield source.key(tuple([ids[place] for place in source.places]))


def moves(task: Task, locate: Callable[[Key], Stored]) -> list[Move]:
    """The strided copies of a task with their sources found."""
    found = []
    for source in task.sources:
        copy = source.copy
        offset = copy.src_offset
        for place, step in source.steps:
            offset += task.ids[place] * step
        if not source.free:
            stored = locate(source.key(tuple([task.ids[place] for place in source.places])))
            found.append(_move(source, stored, offset, copy.dst_offset, task.dtype))
            continue
        for chosen in product(*(loop.ids for loop in source.free)):
            ids = (*task.ids, *chosen)
            stored = locate(source.key(tuple([ids[place] for place in source.places])))
            src = offset + sum(i * loop.src_stride for i, loop in zip(chosen, source.free, strict=True))
            dst = copy.dst_offset + sum(i * loop.dst_stride for i, loop in zip(chosen, source.free, strict=True))
            found.append(_move(source, stored, src, dst, task.dtype))
    return found


def _move(source: Source, stored: Stored, src: int, dst: int, dtype: str) -> Move:
    """One copy into a tensor of `dtype` with its source found; scales are rounded to the dtype that Megatron has."""
    values = None
    if stored.quantised or source.change:
        values = Values(stored, source.change, dtype if source.imports else stored.dtype)
    if stored.strides is None:
        return Move(
            stored.file, stored.offset, stored.dtype, source.shape, src, source.src_strides, dst, source.dst_strides,
            values,
        )  # fmt: skip
    return _restrided(source.copy, stored, src, dst)._replace(values=values)


def _restrided(copy: Copy, stored: Stored, src: int, dst: int) -> Move:
    """A copy from a tensor that is not stored row-major: each stride belongs to one dim, which has another stride."""
    rows, real = row_major_strides(stored.shape), stored.strides or ()
    dims = [(row, step) for row, step, size in zip(rows, real, stored.shape, strict=True) if size > 1]

    def translate(address: int) -> int:
        total = 0
        for row, step in dims:
            count, address = divmod(address, row)
            total += count * step
        return total

    shape, src_strides, dst_strides = coalesced(
        copy.shape, tuple(translate(stride) for stride in copy.src_strides), copy.dst_strides
    )
    return Move(stored.file, stored.offset, stored.dtype, shape, translate(src), src_strides, dst, dst_strides)


class Run(NamedTuple):
    """Contiguous bytes of one of a task's moves, from the move's first byte on; `move` -1 means zeros."""

    move: int
    start: int
    size: int


def runs(found: Sequence[Move], dtype: str, numel: int, least: int) -> list[Run] | None:
    """A tensor as contiguous byte runs in order, when its moves are that: same dtype, inner pieces of `least` bytes.

    Elements that no move writes become zeros.
    """
    width = ITEMSIZE[dtype]
    pieces: list[tuple[int, int, int, int]] = []  # target byte, move, byte from the move's first, size
    for number, move in enumerate(found):
        shape = move.shape
        if move.dtype != dtype or move.values is not None:
            return None
        inner = 1
        if shape and move.src_strides[-1] == 1 and move.dst_strides[-1] == 1:
            inner, shape = shape[-1], shape[:-1]
        if shape and inner * width < least:
            return None
        outer = list(zip(shape, move.src_strides, move.dst_strides, strict=False))
        for index in product(*(range(size) for size, _, _ in outer)):
            src = sum(i * stride for i, (_, stride, _) in zip(index, outer, strict=True))
            dst = move.dst_offset + sum(i * stride for i, (_, _, stride) in zip(index, outer, strict=True))
            pieces.append((dst * width, number, src * width, inner * width))
    pieces.sort()
    made, at = [], 0
    for dst, number, start, size in pieces:
        if dst > at:
            made.append(Run(-1, 0, dst - at))
        made.append(Run(number, start, size))
        at = dst + size
    if at < numel * width:
        made.append(Run(-1, 0, numel * width - at))
    return made
