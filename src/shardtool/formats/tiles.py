"""Whether boxes tile a grid: no element missing, none twice."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

MAX_PAIRS = 10_000_000  # pairs of chunks that are compared where they form no grid: a few seconds

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def tiling_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What is wrong with the boxes (offsets, sizes) as a tiling of `shape`; None if they cover each element once.

    Linear for regular grids, as tensor, expert and pipeline parallel give; a sweep along the first axis otherwise.
    """
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"a chunk of {len(sizes)} axes"
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
            return f"a chunk {list(sizes)} at {list(offsets)} that reaches beyond it"
    full = [box for box in boxes if 0 not in box[1]]
    if _is_grid(shape, full):
        return None
    overlap = _overlap(full)
    if overlap:
        return overlap
    covered, whole = sum(prod(sizes) for _, sizes in full), prod(shape)
    return None if covered == whole else f"chunks for {covered} of {whole} elements"


def _is_grid(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether the boxes are all cells of the grid that their own offsets draw."""
    ends: list[dict[int, int]] = []
    for axis, whole in enumerate(shape):
        starts = sorted({offsets[axis] for offsets, _ in boxes})
        if not starts or starts[0] != 0:
            return False
        ends.append(dict(zip(starts, [*starts[1:], whole], strict=True)))
    cells = prod(len(axis) for axis in ends)
    if len(boxes) != cells or len({offsets for offsets, _ in boxes}) != cells:
        return False
    return all(
        axis[offset] == offset + size
        for offsets, sizes in boxes
        for axis, offset, size in zip(ends, offsets, sizes, strict=True)
    )


def _overlap(boxes: Sequence[Box]) -> str | None:
    active: list[Box] = []
    compared = 0
    for offsets, sizes in sorted(boxes):
        if not offsets:
            return "a scalar stored twice" if len(boxes) > 1 else None
        active = [box for box in active if box[0][0] + box[1][0] > offsets[0]]
        compared += len(active)
        if compared > MAX_PAIRS:
            return f"{len(boxes)} chunks in no order"
        for other, extent in active:
            pairs = zip(offsets, sizes, other, extent, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in pairs):
                return f"chunks that overlap at {list(offsets)}"
        active.append((offsets, sizes))
    return None
