"""The plan: two layouts of the same rules, intersected into strided copies.

`plan(src, dst)` makes one `Copy` per pair of pieces and component: a template that stands for all layers at once,
expanded only when bytes move. It is pure data, made without looking at any tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

from shardtool.errors import BUG, CheckpointError
from shardtool.layout.codecs import Codec, describe
from shardtool.layout.equation import Tensor, boxes, component_axes, view
from shardtool.layout.layout import Key, Layout, Piece

Range = tuple[int, int]


class Geometry(NamedTuple):
    """One component in one stored tensor: address = base + sum(stride * global index), over these boxes of indices."""

    base: int
    strides: Mapping[str, int]
    boxes: tuple[Mapping[str, Range], ...]


class _View(NamedTuple):
    """One component of one piece."""

    component: int
    piece: Piece
    geometry: Geometry
    ids: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Loop:
    """An axis that is in the name on one side or both: the ids to go through, and what each adds to the addresses."""

    axis: str
    ids: tuple[int, ...]
    src_stride: int
    dst_stride: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A strided copy of `shape` elements, once for every combination of the loops' ids. All numbers count elements.

    A source stride of 0 repeats an element (padding rows that repeat the last).
    """

    component: int
    src: Piece
    dst: Piece
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]
    loops: tuple[Loop, ...] = ()

    @property
    def volume(self) -> int:
        """Elements of one instance."""
        return prod(self.shape)

    @property
    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """How source and target store the component."""
        return self.src.codec_of(self.component), self.dst.codec_of(self.component)

    @property
    def changed(self) -> bool:
        """Whether values are computed: the two store them in different ways."""
        src, dst = self.codecs
        return src != dst

    def instances(self) -> Iterator[tuple[tuple[int, ...], Key, int, Key, int]]:
        """(ids of the target's name axes, source key, source offset, target key, target offset) of every instance."""
        order = [loop.axis for loop in self.loops]
        src_at = [order.index(axis.axis) for axis in self.src.names]
        dst_at = [order.index(axis.axis) for axis in self.dst.names]
        src_key, dst_key = self.src.keyer(), self.dst.keyer()
        for ids in product(*(loop.ids for loop in self.loops)):
            src = self.src_offset + sum(i * loop.src_stride for i, loop in zip(ids, self.loops, strict=True))
            dst = self.dst_offset + sum(i * loop.dst_stride for i, loop in zip(ids, self.loops, strict=True))
            dst_ids = tuple(ids[at] for at in dst_at)
            yield dst_ids, src_key(tuple(ids[at] for at in src_at)), src, dst_key(dst_ids), dst


@dataclass(frozen=True, slots=True)
class Region:
    """A strided part of a stored tensor that has no counterpart: padding to fill (target) or to cut (source)."""

    component: int
    piece: Piece
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def volume(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What goes where. `fills` are target regions that take the padding value, `cuts` source regions left out."""

    src: Layout
    dst: Layout
    copies: tuple[Copy, ...]
    fills: tuple[Region, ...]
    cuts: tuple[Region, ...]
    pad: str = "zeros"

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data (JSON), per rule, layers folded."""
        rules = []
        by_rule: dict[int, list[Copy]] = defaultdict(list)
        for copy in self.copies:
            by_rule[copy.dst.rule].append(copy)
        for number, rule in enumerate(self.dst.rules):
            entries = [
                {
                    "component": c.component,
                    "from": [c.src.file, c.src.name, list(c.src.part)],
                    "to": [c.dst.file, c.dst.name, list(c.dst.part)],
                    "shape": list(c.shape),
                    "axes": list(c.axes),
                    "from_offset": c.src_offset,
                    "from_strides": list(c.src_strides),
                    "to_offset": c.dst_offset,
                    "to_strides": list(c.dst_strides),
                    "loops": [[loop.axis, list(loop.ids), loop.src_stride, loop.dst_stride] for loop in c.loops],
                    "replica": c.dst.replica,
                    **_codecs(c),
                }
                for c in by_rule[number]
            ]
            rules.append(
                {"hf": list(rule.hf), "equation": rule.equation.text, "megatron": rule.megatron, "copies": entries}
            )
        region = [
            {"name": r.piece.name, "file": r.piece.file, "shape": list(r.shape), "offset": r.offset} for r in self.fills
        ]
        cut = [
            {"name": r.piece.name, "file": r.piece.file, "shape": list(r.shape), "offset": r.offset} for r in self.cuts
        ]
        return {
            "from": self.src.description,
            "to": self.dst.description,
            "sizes": dict(self.dst.sizes),
            "rules": rules,
            "pad": self.pad,
            "fills": region,
            "cuts": cut,
            **_constants(self),
        }

    def digest(self) -> str:
        """A hash of everything that the plan says."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


def _constants(plan: Plan) -> dict[str, Any]:
    """The tensors that hold one number, on either side, where there are some."""
    sides = {"from": plan.src, "to": plan.dst}
    found = {
        name: [[p.name, list(layout.shape(p)), p.constant] for p in layout.pieces if p.constant is not None]
        for name, layout in sides.items()
    }
    return {"constants": found} if any(found.values()) else {}


def _codecs(copy: Copy) -> dict[str, str]:
    """How a copy changes values, where it does."""
    if not copy.changed:
        return {}
    return dict(zip(("from_codec", "to_codec"), map(describe, copy.codecs), strict=True))


def plan(src: Layout, dst: Layout, *, pad: str = "zeros") -> Plan:
    """The copies that turn a checkpoint in layout `src` into one in layout `dst`.

    Every element of every piece of `dst` is written exactly once (replicas included), every element of the primary
    pieces of `src` is read; CheckpointError names what is not. Constant pieces are no part of either. `pad` is "zeros",
    "last" (repeat the last row) or "mean" (the mean row) for rows of the padded vocabulary.
    """
    sources = _views_by_rule(src, [piece for piece in src.pieces if not piece.replica])
    copies = _copies(sources, _views_by_rule(dst, dst.pieces))
    fills: tuple[Region, ...] = ()
    if pad == "last":
        padding: dict[int, list[_View]] = defaultdict(list)
        for piece in dst.pieces:
            padding[piece.rule] += _padding(dst, piece)
        copies += _copies(_last_rows(src, sources, dst.allocated), padding)
    else:
        fills = tuple(_regions(item for piece in dst.pieces for item in _padding(dst, piece)))
    cuts = tuple(_regions(item for piece in src.pieces for item in _padding(src, piece)))
    made = Plan(src, dst, tuple(copies), fills, cuts, pad)
    _check(made)
    return made


def replicas(layout: Layout) -> Plan | None:
    """The plan that recomputes a layout's replicas from its primary pieces, to be executed as a comparison."""
    found = tuple(piece for piece in layout.pieces if piece.replica)
    if not found:
        return None
    twins = Layout(layout.rules, layout.side, layout.sizes, found, layout.allocated, layout.description + ", replicas")
    sources = _views_by_rule(layout, [piece for piece in layout.pieces if not piece.replica])
    copies = _copies(sources, _views_by_rule(twins, found))
    made = Plan(layout, twins, tuple(copies), tuple(_regions(item for p in found for item in _padding(twins, p))), ())
    _check_written(made)
    return made


def _components(layout: Layout, piece: Piece) -> tuple[int, ...]:
    """The rule's component numbers that a piece holds, in the order of the piece."""
    found = layout.rules[piece.rule].equation.components(layout.side, piece.tensor)
    return found[piece.first : piece.first + piece.dims.components]


def common(src: Layout, dst: Layout, order: Mapping[int, Sequence[int]] | None = None) -> Plan:
    """The copies between what both layouts hold, whether or not that is everything: nothing is checked.

    `order` renames components of the target: component k of rule r is the source's component `order[r][k]`.
    """
    targets = _views_by_rule(dst, dst.pieces)
    for number, names in (order or {}).items():
        targets[number] = [item._replace(component=names[item.component]) for item in targets.get(number, ())]
    sources = _views_by_rule(src, [piece for piece in src.pieces if not piece.replica])
    return Plan(src, dst, tuple(_copies(sources, targets)), (), ())


def _geometry(layout: Layout, piece: Piece, local: int) -> Geometry:
    """The geometry of a piece's component, by its place in the piece."""
    axes = component_axes(piece.dims, local)
    sizes = tuple(sorted((axis, size) for axis, size in layout.stored_sizes(piece).items()))
    logical = tuple((axis, layout.sizes[axis]) for axis in axes)
    return _geometry_of(piece.dims, local, sizes, piece.ranges, piece.window, logical)


@lru_cache(maxsize=4096)
def _geometry_of(
    dims: Tensor,
    component: int,
    sizes: tuple[tuple[str, int], ...],
    ranges: tuple[tuple[str, int, int], ...],
    window: tuple[Range, ...] | None,
    logical: tuple[tuple[str, int], ...],
) -> Geometry:
    stored = dict(sizes)
    lows = {axis: low for axis, low, _ in ranges}
    views = view(dims, component, stored)
    shape = tuple(high - low for low, high in window) if window is not None else dims.shape(stored)
    base, strides = 0, {}
    for at, dim in enumerate(views):
        row = prod(shape[at + 1 :])
        base += (dim.offset - (window[at][0] if window is not None else 0)) * row
        for axis, stride in dim.strides:
            strides[axis] = stride * row
            base -= lows.get(axis, 0) * stride * row
    # local indices, so that windows count rows of the tensor as it is laid out; shifted to global ones at the end
    extent = {axis: (0, max(0, min(stored[axis], size - lows.get(axis, 0)))) for axis, size in logical}
    per_dim = []
    for at, dim in enumerate(views):
        low, high = window[at] if window is not None else (0, dims.shape(stored)[at])
        per_dim.append(boxes(dim, extent, low, high))
    whole = []
    for combination in product(*per_dim):
        box: dict[str, Range] = {}
        for part in combination:
            for axis, (low, high) in part.items():
                box[axis] = (low + lows.get(axis, 0), high + lows.get(axis, 0))
        whole.append(box)
    return Geometry(base, strides, tuple(whole))


def _views_by_rule(layout: Layout, pieces: Iterable[Piece]) -> dict[int, list[_View]]:
    """Every component of every piece, by rule."""
    found: dict[int, list[_View]] = defaultdict(list)
    for piece in pieces:
        if piece.constant is not None:
            continue
        ids = {name.axis: name.ids for name in piece.names}
        for local, component in enumerate(_components(layout, piece)):
            found[piece.rule].append(_View(component, piece, _geometry(layout, piece, local), ids))
    return found


def _copies(sources: Mapping[int, list[_View]], targets: Mapping[int, list[_View]]) -> list[Copy]:
    """The copies between all views of the same component: one per pair of boxes that meet."""
    copies = []
    for number, wanted in targets.items():
        for theirs in wanted:
            for ours in sources.get(number, ()):
                if ours.component == theirs.component and _may_meet(ours.ids, theirs.ids):
                    pairs = product(ours.geometry.boxes, theirs.geometry.boxes)
                    found = (_intersect(ours, src_box, theirs, dst_box) for src_box, dst_box in pairs)
                    copies += [copy for copy in found if copy is not None]
    return copies


def _may_meet(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> bool:
    """A quick test that the ids of common name axes overlap (ids are sorted)."""
    return all(
        ids[0] <= theirs[axis][-1] and theirs[axis][0] <= ids[-1] for axis, ids in ours.items() if axis in theirs
    )


def _intersect(origin: _View, src_box: Mapping[str, Range], goal: _View, dst_box: Mapping[str, Range]) -> Copy | None:
    source, ours, src_ids = origin.piece, origin.geometry, origin.ids
    target, theirs, dst_ids = goal.piece, goal.geometry, goal.ids
    loops = []
    for axis in dict.fromkeys((*dst_ids, *src_ids)):
        ids = _common_ids(axis, src_ids, src_box, dst_ids, dst_box)
        if not ids:
            return None
        loops.append(Loop(axis, ids, ours.strides.get(axis, 0), theirs.strides.get(axis, 0)))
    named = src_ids.keys() | dst_ids.keys()
    box = {}
    for axis in src_box.keys() | dst_box.keys():
        if axis not in named:
            low = max(src_box[axis][0], dst_box[axis][0])
            high = min(src_box[axis][1], dst_box[axis][1])
            if low >= high:
                return None
            box[axis] = (low, high)
    axes = tuple(sorted(box, key=lambda axis: (-theirs.strides[axis], axis)))
    return Copy(
        origin.component,
        source,
        target,
        axes,
        tuple(box[axis][1] - box[axis][0] for axis in axes),
        ours.base + sum(ours.strides[axis] * box[axis][0] for axis in axes),
        tuple(ours.strides[axis] for axis in axes),
        theirs.base + sum(theirs.strides[axis] * box[axis][0] for axis in axes),
        tuple(theirs.strides[axis] for axis in axes),
        tuple(loops),
    )


def _common_ids(
    axis: str,
    src_ids: Mapping[str, tuple[int, ...]],
    src_box: Mapping[str, Range],
    dst_ids: Mapping[str, tuple[int, ...]],
    dst_box: Mapping[str, Range],
) -> tuple[int, ...]:
    """The ids of a name axis that both sides hold; a side that has the axis in a dim holds a range of them."""
    if axis in src_ids and axis in dst_ids:
        ours, theirs = src_ids[axis], dst_ids[axis]
        return theirs if ours == theirs else tuple(sorted(set(ours) & set(theirs)))
    ids, box = (src_ids[axis], dst_box) if axis in src_ids else (dst_ids[axis], src_box)
    if axis not in box:  # one tensor on one side, a name for each id on the other: copies of it
        return ids
    low, high = box[axis]
    return tuple(index for index in ids if low <= index < high)


def _padding(layout: Layout, piece: Piece) -> Iterator[_View]:
    """The allocated but not logical part of a piece, per component and padded axis: views whose boxes are only that."""
    for axis, size in layout.allocated.items():
        if size == layout.sizes[axis]:
            continue
        for local, component in enumerate(_components(layout, piece)):
            axes = component_axes(piece.dims, local)
            if axis not in axes:
                continue
            stored = tuple(sorted(layout.stored_sizes(piece).items()))
            allocated = tuple((name, layout.allocated.get(name, layout.sizes[name])) for name in axes)
            whole = _geometry_of(piece.dims, local, stored, piece.ranges, piece.window, allocated)
            cuts = ({**box, axis: (max(box[axis][0], layout.sizes[axis]), box[axis][1])} for box in whole.boxes)
            kept = tuple(cut for cut in cuts if cut[axis][0] < cut[axis][1])
            yield _View(component, piece, whole._replace(boxes=kept), {name.axis: name.ids for name in piece.names})


def _regions(views: Iterable[_View]) -> Iterator[Region]:
    """The boxes of views, one region each."""
    for item in views:
        strides = item.geometry.strides
        for box in item.geometry.boxes:
            order = tuple(sorted(box, key=lambda name: (-strides[name], name)))
            yield Region(
                item.component,
                item.piece,
                tuple(box[name][1] - box[name][0] for name in order),
                item.geometry.base + sum(strides[name] * box[name][0] for name in order),
                tuple(strides[name] for name in order),
                order,
            )


def _last_rows(src: Layout, sources: Mapping[int, list[_View]], padded: Mapping[str, int]) -> dict[int, list[_View]]:
    """The source's views of the last logical index of a padded axis, which stands for every index of the padding."""
    found: dict[int, list[_View]] = defaultdict(list)
    for number, views in sources.items():
        for item in views:
            geometry = item.geometry
            for axis in geometry.strides.keys() & padded.keys():
                last = src.sizes[axis] - 1
                repeated = Geometry(
                    geometry.base + last * geometry.strides[axis],
                    {**geometry.strides, axis: 0},
                    tuple(
                        {**box, axis: (src.sizes[axis], padded[axis])}
                        for box in geometry.boxes
                        if box[axis][0] <= last < box[axis][1]
                    ),
                )
                found[number].append(item._replace(geometry=repeated))
    return found


def _check(made: Plan) -> None:
    _check_written(made)
    _check_read(made)


def _check_written(made: Plan) -> None:
    """Every element of the target is written once: copies of one piece are disjoint, so it is enough to count."""
    written: dict[int, list[tuple[tuple[tuple[int, ...], ...], int]]] = defaultdict(list)
    for copy in made.copies:
        loops = {loop.axis: loop for loop in copy.loops}
        free = prod(len(loop.ids) for loop in copy.loops if loop.dst_stride)
        ids = tuple(loops[name.axis].ids for name in copy.dst.names)
        written[id(copy.dst)].append((ids, copy.volume * free))
    for fill in made.fills:
        written[id(fill.piece)].append((tuple(name.ids for name in fill.piece.names), fill.volume))
    problems = []
    for piece in made.dst.pieces:
        if piece.constant is not None:
            continue
        numel = prod(made.dst.shape(piece))
        parts = written[id(piece)]
        whole = tuple(name.ids for name in piece.names)
        if all(ids == whole for ids, _ in parts):
            totals = {whole: sum(volume for _, volume in parts)}
        else:
            totals = {tuple((i,) for i in ids): 0 for ids in piece.ids()}
            for ids, volume in parts:
                for one in product(*ids):
                    totals[tuple((i,) for i in one)] += volume
        for ids, total in totals.items():
            if total != numel:
                key = piece.key(tuple(group[0] for group in ids))
                problems.append(f"{key[1]} ({key[0] or made.dst.description}): {total} of {numel} elements")
    _refuse("elements of the target are not written exactly once", problems, made)


def _check_read(made: Plan) -> None:
    """Every logical element of the source's primary pieces is read once by the target's primary pieces."""
    read: dict[int, int] = defaultdict(int)
    for copy in made.copies:
        if not copy.dst.replica and 0 not in copy.src_strides[: len(copy.shape)]:
            read[id(copy.src)] += copy.volume * prod(len(loop.ids) for loop in copy.loops)
    dropped: dict[int, int] = defaultdict(int)
    for cut in made.cuts:
        dropped[id(cut.piece)] += cut.volume
    problems = []
    for piece in made.src.pieces:
        if piece.replica or piece.constant is not None:
            continue
        numel = prod(made.src.shape(piece)) * piece.instances - dropped[id(piece)]
        if read[id(piece)] != numel:
            problems.append(
                f"{piece.name} ({piece.file or made.src.description}): {read[id(piece)]} of {numel} elements"
            )
    _refuse("elements of the source are not read exactly once", problems, made)


def _refuse(what: str, problems: list[str], made: Plan) -> None:
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(
            what, where=f"{made.src.description} -> {made.dst.description}", details=tuple(shown), hint=BUG
        )
