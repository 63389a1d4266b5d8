"""Fingerprints of components: equal data has equal prints, and a permuted axis shows as permuted prints.

The print of a component is a sum over its elements: the element's bits, times a random odd number for its index on each
axis (multilinear hashing, modulo 2^64). Of every axis there is also a print per index, which leaves that axis' number
out: if index 3 of one side and index 5 of the other hold the same numbers, in the same order on the other axes, these
two prints are equal, however large the rest is. So one pass over the data, in tiles, answers for all axes at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from shardtool.diff.sides import Ids, name_axes
from shardtool.execute.engine import Task, assemble, moves, tasks
from shardtool.execute.tiles import Workspace
from shardtool.formats.stored import ITEMSIZE, Stored
from shardtool.layout.equation import Equation, Tensor, component_axes
from shardtool.layout.layout import Key, Layout, NameAxis, Piece
from shardtool.layout.rules import LAYER, Rule
from shardtool.plan.plan import common

Locate = Callable[[Key], Stored]
Numbers = Any  # a numpy array of uint64

TOGETHER = ("g", "q")  # two axes that some tools put in the other order: also printed as one


class Prints(Struct, frozen=True):
    """The print of a component as a whole, of each index of each axis, and of two axes as one, by their names joined."""

    total: int
    axes: Mapping[str, Numbers]


@lru_cache(maxsize=256)
def _numbers(axis: str, size: int) -> Numbers:
    """Random odd numbers, one for each index of an axis."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(axis.encode())))
    return generator.integers(0, 2**64, size, dtype=np.uint64) | np.uint64(1)


def components(layout: Layout, locate: Locate, number: int, dtype: str) -> dict[tuple[int, Ids], Prints]:
    """The prints of every complete component of a rule, by component and ids, its values as `dtype`."""
    rule = layout.rules[number]
    target = rule.target
    axes = [component_axes(target, component) for component in range(target.components)]
    probe = probing(layout, number, [Tensor(tuple((axis,) for axis in names)) for names in axes])
    found = {}
    with_space = Workspace()
    try:
        for task in probe_tasks(layout, probe, dtype):
            if (ready := complete(task, locate)) is not None:
                found[task.piece.tensor, task.ids] = _of(with_space, task, ready, axes[task.piece.tensor])
    finally:
        with_space.close()
    return found


def whole(
    layout: Layout, locate: Locate, dtype: str, probe: Layout, order: Sequence[int] | None = None
) -> dict[tuple[int, Ids], int]:
    """The print of each tensor of a probe as it lies in its memory, by the number of the piece and ids."""
    found, space, number = {}, Workspace(), probe.pieces[0].rule
    places = {id(piece): at for at, piece in enumerate(probe.pieces)}
    try:
        for task in probe_tasks(layout, probe, dtype, {number: order} if order else None):
            if (ready := complete(task, locate)) is not None:
                names = tuple(f"dim{at}" for at in range(len(task.shape)))
                found[places[id(task.piece)], task.ids] = _of(space, task, ready, names).total
    finally:
        space.close()
    return found


def probing(
    layout: Layout,
    number: int,
    tensors: Sequence[Tensor],
    cuts: Sequence[Mapping[str, Any]] = ({},),
    only: Ids | None = None,
) -> Layout:
    """A layout that is on no disk: one rule's components in these tensors, each cut as `cuts` say (fields of Piece).

    `only` are the ids of the one instance that is wanted.
    """
    rule = layout.rules[number]
    count = sum(tensor.components for tensor in tensors)
    order = rule.equation.order if tuple(tensors) == rule.equation.right else tuple(range(count))
    equation = Equation(rule.equation.left, tuple(tensors), "probe", order)
    axes = name_axes(rule)
    held = [_ids(rule, axis, layout.sizes) for axis in axes] if only is None else [(index,) for index in only]
    names = tuple(NameAxis(axis, ids) for axis, ids in zip(axes, held, strict=True))
    shown = "".join("{" + axis.axis + "}." for axis in names)
    pieces = tuple(
        Piece(number, tensor, dims, f"{at}.{tensor}.{shown}", "", names, **cut)
        for at, cut in enumerate(cuts)
        for tensor, dims in enumerate(tensors)
    )
    rules = tuple(replace(one, equation=equation) if at == number else one for at, one in enumerate(layout.rules))
    return Layout(rules, 1, layout.sizes, pieces, {}, "probe")


def _ids(rule: Rule, axis: str, sizes: Mapping[str, int]) -> Ids:
    return rule.ids(sizes[LAYER]) if axis == LAYER else tuple(range(sizes[axis]))


def probe_tasks(
    layout: Layout, probe: Layout, dtype: str, order: Mapping[int, Sequence[int]] | None = None
) -> Iterator[Task]:
    """What is to be read of a layout to fill a probe's tensors."""
    number = probe.pieces[0].rule
    held = replace(layout, pieces=tuple(piece for piece in layout.pieces if piece.rule == number))
    return tasks(common(held, probe, order), lambda _: dtype)


def complete(task: Task, locate: Locate) -> list[Any] | None:
    """The copies of a task, None where they do not make all of its elements."""
    found = moves(task, locate)
    return found if sum(prod(move.shape) for move in found) == prod(task.shape) else None


def _of(space: Workspace, task: Task, ready: list[Any], axes: tuple[str, ...]) -> Prints:
    shape = task.shape or (1,)
    names = axes or ("",)
    width = ITEMSIZE[task.dtype]
    numbers = [_numbers(axis, size) for axis, size in zip(names, shape, strict=True)]
    sums = [np.zeros(size, np.uint64) for size in shape]
    pair = names[:2] == TOGETHER and len(shape) > 2
    both = np.zeros(shape[0] * shape[1], np.uint64) if pair else None
    total = 0
    row = shape[-1]
    for low, tile in assemble(space, task, ready):
        bits = np.frombuffer(tile, f"u{width}").astype(np.uint64)
        first, offset = divmod(low, row)
        count = -(-(offset + len(bits)) // row)
        if offset or len(bits) % row:  # a part of one long row, or of the first and the last
            padded = np.zeros(count * row, np.uint64)
            padded[offset : offset + len(bits)] = bits
            bits = padded
        block = bits.reshape(count, row)
        indices = np.unravel_index(np.arange(first, first + count), shape[:-1]) if len(shape) > 1 else ()
        factors = [numbers[at][index] for at, index in enumerate(indices)]
        outer = _product(factors, count)
        inner = block @ numbers[-1]
        sums[-1] += outer @ block
        for at, index in enumerate(indices):
            np.add.at(sums[at], index, inner * _product(factors[:at] + factors[at + 1 :], count))
        if both is not None:
            np.add.at(both, indices[0] * shape[1] + indices[1], inner * _product(factors[2:], count))
        total = (total + int((outer * inner).sum(dtype=np.uint64))) % 2**64
    found = dict(zip(names, sums, strict=True))
    return Prints(total, found | ({"".join(TOGETHER): both} if both is not None else {}))


def _product(factors: Sequence[Numbers], count: int) -> Numbers:
    result = np.ones(count, np.uint64)
    for factor in factors:
        result = result * factor
    return result
