"""From a rule whose values differ to the names of what happened to them.

Tried in this order, each on all of the data: zeros; what another component, layer or expert of a holds; one axis
permuted; a relation of the values element by element; the stored tensor in another layout; a few indices of an axis
alone; what another rule of a holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct

from shardtool.diff import prints
from shardtool.diff.permutations import Diagnosis, axis_name, describe, describe_copies, origins, permutation, ranges
from shardtool.diff.prints import Prints, probing, whole
from shardtool.diff.relations import relate
from shardtool.diff.sides import Ids, Pair, Side, name_axes
from shardtool.diff.variants import Variant, sum_dim, variants
from shardtool.errors import UsageError
from shardtool.formats.stored import ITEMSIZE
from shardtool.layout.equation import component_axes
from shardtool.layout.megatron import tp_cuts
from shardtool.layout.rules import EXPERT, LAYER, Rule

Place = tuple[int, Ids]  # a component of a rule, and the ids of its name axes

PARTS = {3: ("query", "key", "value"), 2: ("gate", "up")}


class Found(Struct, frozen=True):
    """What a rule's differing components are diagnosed as; None where nothing that is known explains it.

    `complete`: both sides have every component whole, so that what is not among the places is equal.
    """

    places: Mapping[Place, Diagnosis | None]
    complete: bool
    details: tuple[str, ...] = ()


class Diagnosing:
    """Diagnoses the rules of a pair, and keeps the prints of a that several rules ask for."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._totals: dict[int, dict[int, Place]] = {}

    def rule(self, number: int, dtypes: tuple[str, str]) -> Found:
        """What became of the components of one rule that differ, compared in the narrower of the two dtypes."""
        dtype = min(dtypes[::-1], key=lambda name: ITEMSIZE[name])
        ours, theirs = (
            prints.components(side.layout, side.said.locate, number, dtype) for side in (self.pair.a, self.pair.b)
        )
        differing = [place for place in sorted(ours.keys() & theirs.keys()) if ours[place].total != theirs[place].total]
        found: dict[Place, Diagnosis | None] = {}
        left = list(differing)
        for attempt in (self._zeros, self._moved, self._permuted):
            found |= attempt(number, ours, theirs, left)
            left = [place for place in left if place not in found]
        details: list[str] = []
        if left:
            explained, details = self._related(number, dtypes, left)
            found |= explained
            left = [place for place in left if place not in found]
        if left:
            found |= self._laid_out(number, dtype, left)
            left = [place for place in left if place not in found]
            details = details if left else []
        found |= self._confined(ours, theirs, left)
        left = [place for place in left if place not in found]
        found |= self._elsewhere(number, theirs, dtype, left)
        complete = ours.keys() == theirs.keys() and bool(ours)
        return Found({place: found.get(place) for place in differing}, complete, tuple(details))

    @staticmethod
    def _zeros(
        _number: int, _ours: Mapping[Place, Prints], theirs: Mapping[Place, Prints], left: Iterable[Place]
    ) -> dict[Place, Diagnosis]:
        return {place: Diagnosis("zeroed", "all zeros in b") for place in left if theirs[place].total == 0}

    def _moved(
        self, number: int, ours: Mapping[Place, Prints], theirs: Mapping[Place, Prints], left: list[Place]
    ) -> dict[Place, Diagnosis]:
        """Components that are those of another component, layer or expert of a."""
        rule = self.pair.a.layout.rules[number]
        places: dict[int, list[Place]] = defaultdict(list)
        for place, one in ours.items():
            places[one.total].append(place)
        source: dict[Place, Place] = {}
        for place in left:
            held = places.get(theirs[place].total, [])
            if held:  # of several with the same content the nearest
                source[place] = min(held, key=lambda other: (other[1] != place[1], other[0] != place[0], other))
        return {place: self._move(rule, place, source) for place in source}

    def _move(self, rule: Rule, place: Place, source: Mapping[Place, Place]) -> Diagnosis:
        component, ids = place
        origin = source[place]
        if origin[1] == ids:
            names = component_names(rule)
            mine, other = names[component], names[origin[0]]
            if source.get(origin) == place:
                first, second = sorted((component, origin[0]))
                code = f"{names[first]}_{names[second]}_swapped".replace(" ", "_")
                return Diagnosis(code, f"{names[first]} and {names[second]} swapped")
            return Diagnosis("component_moved", f"{mine} is a's {other}")
        axes = name_axes(rule)
        changed = [at for at, (here, there) in enumerate(zip(ids, origin[1], strict=True)) if here != there]
        if len(changed) == 1 and origin[0] == component:
            at = changed[0]
            mates = {
                other[1][at]: origin[1][at]
                for other, origin in source.items()
                if other[0] == component and _without(other[1], at) == _without(ids, at) == _without(origin[1], at)
            }
            sizes = self.pair.a.layout.sizes
            moved = [mates.get(index, index) for index in range(sizes[axes[at]])]
            if permutation(moved) is not None:
                return describe(axes[at], moved, self._blocks(axes[at], rule))
        said = ", ".join(f"{_one(axis)} {index}" for axis, index in zip(axes, origin[1], strict=True))
        return Diagnosis("moved", f"is a's of {said}")

    def _permuted(
        self, number: int, ours: Mapping[Place, Prints], theirs: Mapping[Place, Prints], left: Iterable[Place]
    ) -> dict[Place, Diagnosis]:
        rule = self.pair.a.layout.rules[number]
        found = {}
        for place in left:
            for axis, mine in ours[place].axes.items():
                if len(mine) < 2:
                    continue
                moved = permutation(origins(mine.tolist(), theirs[place].axes[axis].tolist()))
                if moved is not None and moved != sorted(moved):
                    found[place] = describe(axis, moved, self._blocks(axis, rule))
                    break
        return found

    def _blocks(self, axis: str, rule: Rule) -> dict[str, int]:
        """The sizes of blocks of an axis that have a name: what one rank or stage of either side holds."""
        found: dict[str, int] = {}
        size = self.pair.a.layout.sizes.get(axis, 0)
        for side in (self.pair.b, self.pair.a):
            mesh = side.said.mesh
            if axis == rule.tp:
                name, count = "tp shard", mesh.expert_tp if rule.per_expert else mesh.tp
                size = side.layout.allocated.get(axis, size)
            elif axis == EXPERT:
                name, count = "ep rank", mesh.ep
            elif axis == LAYER:
                name, count = "model chunk", mesh.pp * mesh.vpp
            else:
                continue
            if count > 1 and size % count == 0:
                found.setdefault(name, size // count)
        return found

    def _laid_out(self, number: int, dtype: str, left: list[Place]) -> dict[Place, Diagnosis]:
        """Tensors that are in another layout than the rule's."""
        a, b = self.pair.a, self.pair.b
        waiting = sorted({ids for _, ids in left})
        found: dict[Place, Diagnosis] = {}
        while waiting:
            one = waiting[0]
            for right, wrong, who in ((b, a, "in b: "), (a, b, "in a: ")):
                tries = self._tries(number)
                match = next((tried for tried in tries if _fits(right, wrong, number, dtype, tried, one)), None)
                if match is None:
                    continue
                said = Diagnosis(match[0].diagnosis.code, who + match[0].diagnosis.text)
                same = {ids for ids in waiting if ids == one or _fits(right, wrong, number, dtype, match, ids)}
                found |= {place: said for place in left if place[1] in same}
                waiting = [ids for ids in waiting if ids not in same]
                break
            else:
                waiting = waiting[1:]
        return found

    def _tries(self, number: int) -> Iterator[tuple[Variant, list[dict[str, Any]]]]:
        """The variants of a rule, each with how its tensor may be cut over ranks."""
        rule = self.pair.a.layout.rules[number]
        layout = self.pair.b.layout
        sizes = {**layout.sizes, "v": max(layout.sizes.get("v", 0), *layout.allocated.values(), 0)}
        meshes = [side.said.mesh for side in (self.pair.b, self.pair.a)]
        counts = dict.fromkeys([*((mesh.expert_tp if rule.per_expert else mesh.tp) for mesh in meshes), 1])
        for variant in variants(rule, component_names(rule)):
            for tp in counts:
                if tp == 1 and variant.windows:
                    continue
                try:
                    cuts = tp_cuts(rule, tp, sizes)
                except UsageError:
                    continue
                if rule.tp is None or tp == 1:
                    yield variant, [{}]
                elif all(cut is not None for cut, _ in cuts):
                    yield variant, [{"ranges": (cut,)} for cut, _ in cuts]

    @staticmethod
    def _share(axes: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[float, str, list[int]]]:
        for axis, mine in axes.items():
            wrong = [index for index, (x, y) in enumerate(zip(mine, other[axis], strict=True)) if x != y]
            if wrong and len(mine) > 2:
                yield len(wrong) / len(mine), axis, wrong

    def _confined(
        self, ours: Mapping[Place, Prints], theirs: Mapping[Place, Prints], left: Iterable[Place]
    ) -> dict[Place, Diagnosis]:
        """Components that differ at a few indices of an axis alone, or hold there what other indices of a do."""
        found = {}
        for place in left:
            shares = sorted(self._share(ours[place].axes, theirs[place].axes))
            for _, axis, wrong in shares:
                known = origins(ours[place].axes[axis].tolist(), theirs[place].axes[axis].tolist())
                if (said := describe_copies(axis, known, wrong)) is not None:
                    found[place] = said
                    break
            else:
                if shares and shares[0][0] <= 0.5:
                    _, axis, wrong = shares[0]
                    zero = all(int(theirs[place].axes[axis][index]) == 0 for index in wrong)
                    where = f"{axis_name(axis)} {ranges(wrong)}"
                    found[place] = (
                        Diagnosis("partly_zeroed", f"{where} are zeros in b")
                        if zero
                        else Diagnosis("confined", f"only {where} differ")
                    )
        return found

    def _related(
        self, number: int, dtypes: tuple[str, str], left: Iterable[Place]
    ) -> tuple[dict[Place, Diagnosis], list[str]]:
        wanted = set(left)
        found, sizes = {}, {}
        a, b = ((side.layout, side.said.locate) for side in (self.pair.a, self.pair.b))
        for place, relation in relate(a, b, number, dtypes, lambda *at: at in wanted).items():
            said = relation.diagnosis()
            if said is not None:
                found[place] = said
            if said is None or said.code == "one_element":
                sizes[relation.largest] = relation.size
        return found, [sizes[max(sizes)]] if sizes else []

    def _elsewhere(
        self, number: int, theirs: Mapping[Place, Prints], dtype: str, left: list[Place]
    ) -> dict[Place, Diagnosis]:
        """Components that another rule of a has."""
        found = {}
        layout = self.pair.a.layout
        target = layout.rules[number].target
        for place in left:
            axes = component_axes(target, place[0])
            for other, rule in enumerate(layout.rules):
                if other == number or axes not in _all_axes(rule):
                    continue
                if other not in self._totals:
                    made = prints.components(layout, self.pair.a.said.locate, other, dtype)
                    self._totals[other] = {one.total: at for at, one in made.items()}
                if (origin := self._totals[other].get(theirs[place].total)) is not None:
                    found[place] = Diagnosis("moved", f"is a's {_instance(rule, origin)}")
                    break
        return found


def _fits(
    right: Side, wrong: Side, number: int, dtype: str, tried: tuple[Variant, list[dict[str, Any]]], ids: Ids
) -> bool:
    """Whether the one side's tensor in the rule's layout is the other's in the variant."""
    variant, cuts = tried
    rule = right.layout.rules[number]
    proper = probing(right.layout, number, [rule.target], cuts, ids)
    layout = wrong.layout
    if variant.windows:
        shape = variant.dims.shape({**layout.sizes})
        at = sum_dim(rule.target)
        step, rest = divmod(shape[at or 0], len(cuts))
        if rest or at is None:
            return False
        cuts = [
            {
                "window": tuple(
                    (rank * step, (rank + 1) * step) if dim == at else (0, size) for dim, size in enumerate(shape)
                )
            }
            for rank in range(len(cuts))
        ]
    changed = probing(layout, number, [variant.dims], cuts, ids)
    if [proper.shape(piece) for piece in proper.pieces] != [changed.shape(piece) for piece in changed.pieces]:
        return False
    ours = whole(right.layout, right.said.locate, dtype, proper)
    theirs = whole(layout, wrong.said.locate, dtype, changed, variant.order)
    return bool(ours) and len(ours) == len(proper.pieces) and ours == theirs


def component_names(rule: Rule) -> tuple[str, ...]:
    """What the components of a rule are called."""
    count = rule.target.components
    if count == 1:
        return ("all",)
    if ("linear_qkv" in rule.megatron and count == 3) or ("linear_fc1" in rule.megatron and count == 2):
        return PARTS[count]
    if len(rule.hf) == count:
        return tuple(name.removesuffix(".weight").removesuffix(".bias").split(".")[-1] for name in rule.hf)
    return tuple(f"part {number}" for number in range(count))


def _all_axes(rule: Rule) -> set[tuple[str, ...]]:
    return {component_axes(rule.target, component) for component in range(rule.target.components)}


def _instance(rule: Rule, place: Place) -> str:
    name = rule.megatron
    for axis, index in zip(name_axes(rule), place[1], strict=True):
        name = name.replace("{" + axis + "}", str(index))
    names = component_names(rule)
    return name if len(names) == 1 else f"{names[place[0]]} of {name}"


def _one(axis: str) -> str:
    return {LAYER: "layer", EXPERT: "expert"}.get(axis, "MTP layer")


def _without(ids: Ids, at: int) -> Ids:
    return ids[:at] + ids[at + 1 :]
