"""How the values of a component relate element by element: scaled, off by one, rounded, negated, one bit flipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from msgspec import Struct, field

from shardtool.diff.permutations import Diagnosis
from shardtool.diff.prints import Locate, complete, probe_tasks, probing
from shardtool.diff.sides import Ids
from shardtool.execute.engine import Task, assemble
from shardtool.execute.numbers import numpy_dtype
from shardtool.execute.tiles import Workspace
from shardtool.layout.equation import Tensor, component_axes
from shardtool.layout.layout import Layout

Values = Any  # a numpy array of float64

# of two roundings to nearest, relative to the value
ROUNDING = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-22, "float64": 2.0**-50}
LOWER = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


class Relation(Struct):
    """What holds between all elements of a component so far. `counts`: elements, differing, NaN or infinite in a and b."""

    tolerance: float
    elements: int = 0
    differing: int = 0
    first: tuple[float, float] = (0.0, 0.0)
    broken: list[int] = field(default_factory=lambda: [0, 0])
    largest: float = 0.0
    squares: float = 0.0
    scale: float | None = None  # of b to a, from the first tile that is not zero
    scaled: bool = True
    shifts: dict[float, bool] = field(default_factory=lambda: {1.0: True, -1.0: True})
    rounded: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(LOWER, True))
    rounding: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(LOWER, True))
    zeros: list[bool] = field(default_factory=lambda: [True, True])

    def add(self, a: Values, b: Values) -> None:
        """Take in the next elements of both sides."""
        for at, side in enumerate((a, b)):
            self.broken[at] += int(np.count_nonzero(~np.isfinite(side)))
            self.zeros[at] = self.zeros[at] and not side.any()
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        unequal = int(np.count_nonzero(~same))
        if unequal and not self.differing:
            at = int(np.argmin(same))
            self.first = (float(a[at]), float(b[at]))
        self.elements, self.differing = self.elements + len(a), self.differing + unequal
        with np.errstate(all="ignore"):
            gap = np.abs(b - a)
            self.largest = max(self.largest, float(np.nan_to_num(gap, nan=math.inf).max(initial=0.0)))
            self.squares += float(np.square(a).sum())
            self._relate(a, b)

    def _relate(self, a: Values, b: Values) -> None:
        if self.scale is None and a.any():
            self.scale = float((a * b).sum() / (a * a).sum())
        if self.scaled and self.scale is not None:
            self.scaled = _near(b, a * self.scale, self.tolerance)
        for shift, holds in self.shifts.items():
            # what was rounded may have been near 1, the result near 0
            self.shifts[shift] = holds and _near(b, a + shift, self.tolerance, np.maximum(np.abs(a), 1.0))
        for name in LOWER:
            kind = numpy_dtype(name, values=True)
            if self.rounded[name]:
                self.rounded[name] = bool(np.array_equal(a.astype(np.float32).astype(kind).astype(a.dtype), b))
            if self.rounding[name]:
                self.rounding[name] = bool(np.array_equal(b.astype(np.float32).astype(kind).astype(a.dtype), a))

    def diagnosis(self) -> Diagnosis | None:
        """The relation by name."""
        return next(self._holding(), None)

    def _holding(self) -> Iterator[Diagnosis]:
        if any(self.zeros):
            yield Diagnosis("zeroed", "all zeros in b" if self.zeros[1] else "all zeros in a")
        for name in LOWER:
            if self.rounded[name]:
                yield Diagnosis("rounded", f"b is a rounded to {name}")
            if self.rounding[name]:
                yield Diagnosis("rounded", f"a is b rounded to {name}")
        for shift, holds in self.shifts.items():
            if holds:
                yield Diagnosis("off_by_one", f"b is a {'plus' if shift > 0 else 'minus'} 1")
        if self.broken[0] != self.broken[1]:
            yield Diagnosis("not_finite", f"NaN or infinite: {self.broken[0]} elements of a, {self.broken[1]} of b")
        if self.differing == 1:
            yield Diagnosis("one_element", f"one element: {self.first[0]:.9g} in a, {self.first[1]:.9g} in b")
        if self.scaled and self.scale is not None and self.elements > 1:
            yield self._scaling(self.scale)

    def _scaling(self, scale: float) -> Diagnosis:
        if abs(scale - 1.0) <= self.tolerance:
            return Diagnosis("rounding", "the same but for the last digits")
        shown = f"{scale:.{3 if self.tolerance > 1e-4 else 6}g}"
        if shown == "-1":
            return Diagnosis("negated", "b is a with the other sign")
        return Diagnosis("scaled", f"b is a times {shown}")

    @property
    def size(self) -> str:
        """How large the differences are."""
        root = math.sqrt(self.squares / self.elements) if self.elements else 0.0
        return f"largest |a - b| {self.largest:.3g}" + (f", {self.largest / root:.2g} of a's rms" if root else "")


def _near(found: Values, wanted: Values, tolerance: float, size: Values | None = None) -> bool:
    bound = tolerance * (np.abs(wanted) if size is None else size) + np.finfo(np.float32).tiny
    return bool((np.abs(found - wanted) <= bound).all())


def relate(
    a: tuple[Layout, Locate], b: tuple[Layout, Locate], number: int, dtypes: tuple[str, str],
    wanted: Callable[[int, Ids], bool],
) -> dict[tuple[int, Ids], Relation]:  # fmt: skip
    """Compare components of a rule element by element: those that `wanted` (component, ids) says and both sides have."""
    rough = max(dtypes, key=lambda name: ROUNDING.get(name, 0.0))
    kind = "float64" if "float64" in dtypes else "float32"
    found = {}
    spaces = Workspace(), Workspace()
    try:
        others = {(task.piece.tensor, task.ids): task for task in _tasks(b[0], number, kind)}
        for ours in _tasks(a[0], number, kind):
            place = ours.piece.tensor, ours.ids
            if not wanted(*place) or (theirs := others.get(place)) is None:
                continue
            left, right = complete(ours, a[1]), complete(theirs, b[1])
            if left is None or right is None:
                continue
            relation = found[place] = Relation(ROUNDING.get(rough, 0.0))
            tiles = zip(assemble(spaces[0], ours, left), assemble(spaces[1], theirs, right), strict=True)
            for (_, x), (_, y) in tiles:
                relation.add(*(np.frombuffer(tile, kind).astype(np.float64) for tile in (x, y)))
    finally:
        for space in spaces:
            space.close()
    return found


def _tasks(layout: Layout, number: int, kind: str) -> Iterator[Task]:
    target = layout.rules[number].target
    axes = [component_axes(target, component) for component in range(target.components)]
    return probe_tasks(layout, probing(layout, number, [Tensor(tuple((x,) for x in names)) for names in axes]), kind)
