"""The plan: two layouts of the same rules, intersected into strided copies.

`plan(src, dst)` makes one `Copy` per pair of pieces and component: a template that stands for all layers at once,
expanded only when bytes move. It is pure data, made without looking at any tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod

from msgspec import Struct
from msgspec.structs import replace

from shardtool.layout.equation import Tensor, boxes, component_axes, view
from shardtool.layout.layout import Layout, Piece
from shardtool.plan.accounting import check, check_written
from shardtool.plan.copies import Copy, Loop, Plan, Range, Region


class Geometry(Struct, frozen=True):
    """One component in one stored tensor: address = base + sum(stride * global index), over these boxes of indices."""

    base: int
    strides: Mapping[str, int]
    boxes: tuple[Mapping[str, Range], ...]


class _View(Struct, frozen=True):
    """One component of one piece."""

    component: int
    piece: Piece
    geometry: Geometry
    ids: Mapping[str, tuple[int, ...]]


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
    check(made)
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
    check_written(made)
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
        targets[number] = [replace(item, component=names[item.component]) for item in targets.get(number, ())]
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
    # pieces that differ in their names and files alone hold their components alike: a geometry is made once for them
    alike: dict[Hashable, list[tuple[int, Geometry]]] = {}
    for piece in pieces:
        if piece.constant is not None:
            continue
        held = (piece.rule, piece.tensor, piece.first, piece.dims, piece.ranges, piece.window)
        if held not in alike:
            parts = enumerate(_components(layout, piece))
            alike[held] = [(component, _geometry(layout, piece, local)) for local, component in parts]
        ids = {name.axis: name.ids for name in piece.names}
        found[piece.rule] += [_View(component, piece, geometry, ids) for component, geometry in alike[held]]
    return found


def _copies(sources: Mapping[int, list[_View]], targets: Mapping[int, list[_View]]) -> list[Copy]:
    """The copies between all views of the same component: one per pair of boxes that meet."""
    copies = []
    for number, wanted in targets.items():
        # replicas are many, and read alike: what meets in one is what meets in the others
        known: dict[Hashable, list[Copy]] = {}
        for theirs in wanted:
            piece = theirs.piece
            alike = (theirs.component, id(theirs.geometry), piece.names)
            if alike not in known:
                known[alike] = list(_met(sources.get(number, ()), theirs))
            copies += [copy if copy.dst is piece else _into(copy, piece) for copy in known[alike]]
    return copies


def _met(sources: Iterable[_View], theirs: _View) -> Iterator[Copy]:
    """The copies into one view."""
    for ours in sources:
        if ours.component == theirs.component and _may_meet(ours.ids, theirs.ids):
            for src_box, dst_box in product(ours.geometry.boxes, theirs.geometry.boxes):
                if copy := _intersect(ours, src_box, theirs, dst_box):
                    yield copy


def _into(copy: Copy, piece: Piece) -> Copy:
    """The same copy into another piece (quicker than `replace`, for there are thousands)."""
    return Copy(
        copy.component, copy.src, piece, copy.axes, copy.shape, copy.src_offset, copy.src_strides, copy.dst_offset,
        copy.dst_strides, copy.loops,
    )  # fmt: skip


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
            yield _View(component, piece, replace(whole, boxes=kept), {name.axis: name.ids for name in piece.names})


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
                found[number].append(replace(item, geometry=repeated))
    return found
