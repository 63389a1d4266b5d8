"""Chunks that tile a tensor, and those that do not."""

from __future__ import annotations

import time
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from shardtool.formats.tiles import Box, tiling_fault


def cells(shape: tuple[int, ...], steps: tuple[int, ...]) -> list[Box]:
    axes = [range(0, whole, step) for whole, step in zip(shape, steps, strict=True)]
    return [
        (at, tuple(min(step, whole - a) for a, step, whole in zip(at, steps, shape, strict=True)))
        for at in product(*axes)
    ]


def test_grids() -> None:
    assert tiling_fault((), [((), ())]) is None
    assert tiling_fault((0, 3), []) is None
    assert tiling_fault((0, 3), [((0, 0), (0, 3))]) is None
    assert tiling_fault((4, 6), cells((4, 6), (1, 3))) is None
    assert tiling_fault((5,), [((0,), (2,)), ((2,), (3,))]) is None


def test_irregular_tilings() -> None:
    bricks = [((0, 0), (1, 2)), ((0, 2), (1, 4)), ((1, 0), (1, 3)), ((1, 3), (1, 3))]
    assert tiling_fault((2, 6), bricks) is None
    assert tiling_fault((2, 6), bricks[:-1]) == "chunks for 9 of 12 elements"


def test_faults() -> None:
    assert tiling_fault((4,), []) == "chunks for 0 of 4 elements"
    assert tiling_fault((), []) == "chunks for 0 of 1 elements"
    assert tiling_fault((), [((), ()), ((), ())]) == "a scalar stored twice"
    assert "overlap" in str(tiling_fault((4,), [((0,), (3,)), ((2,), (2,))]))
    assert "beyond" in str(tiling_fault((4,), [((0,), (5,))]))
    assert "axes" in str(tiling_fault((4,), [((0, 0), (4, 1))]))
    # one overlap and one hole of the same size: the volume alone would not tell
    assert "overlap" in str(tiling_fault((4,), [((0,), (2,)), ((1,), (2,))]))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_a_missing_or_doubled_cell_is_seen(shape: list[int], data: st.DataObject) -> None:
    steps = tuple(data.draw(st.integers(1, size)) for size in shape)
    boxes = cells(tuple(shape), steps)
    assert tiling_fault(tuple(shape), data.draw(st.permutations(boxes))) is None
    victim = data.draw(st.integers(0, len(boxes) - 1))
    assert tiling_fault(tuple(shape), boxes[:victim] + boxes[victim + 1 :]) is not None
    assert tiling_fault(tuple(shape), [*boxes, boxes[victim]]) is not None


def test_fifty_thousand_chunks_are_quick() -> None:
    boxes = cells((58, 256, 4, 8), (1, 1, 2, 4))
    start = time.perf_counter()
    assert tiling_fault((58, 256, 4, 8), boxes) is None
    assert time.perf_counter() - start < 20
