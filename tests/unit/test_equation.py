"""Equations: what they mean (row-major, sums side by side), that views tile, that windows become the right boxes."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool.layout.equation import DimView, boxes, component_axes, nested_boxes, parse, parse_tensor, view

EXAMPLES = settings(max_examples=200, deadline=None)
AXES = "abcdefg"

# A dim as the tests see it: a list of factors, each an axis or a list of terms (lists of factors).


@st.composite
def factors(draw, axes: str, depth: int):
    """A product over some of `axes`; an axis occurs in several terms of a sum, but not twice in one component."""
    left, found = axes, []
    for _ in range(draw(st.integers(1, 3))):
        if not left:
            break
        if depth and draw(st.integers(0, 2)) == 0:
            terms = [draw(factors(left, depth - 1)) for _ in range(draw(st.integers(2, 3)))]
            found.append(terms)
            left = "".join(axis for axis in left if axis not in used(terms))
        else:
            axis = draw(st.sampled_from(left))
            found.append(axis)
            left = left.replace(axis, "")
    return found


def used(item) -> set[str]:
    return {item} if isinstance(item, str) else set().union(*map(used, item))


def text_of(items, top: bool = True) -> str:
    parts = [item if isinstance(item, str) else f"({' + '.join(text_of(t, False) for t in item)})" for item in items]
    return f"({' '.join(parts)})" if top and len(parts) > 1 else " ".join(parts)


@st.composite
def tensors(draw):
    left, dims = AXES, []
    for _ in range(draw(st.integers(1, 3))):
        if left:
            dims.append(draw(factors(left, 2)))
            left = "".join(axis for axis in left if axis not in used(dims[-1]))
    return dims, {axis: draw(st.integers(1, 3)) for axis in AXES}


def elements(items, sizes):
    """What stands along a dim, in order: (the terms that were chosen, the index of each axis)."""
    if not items:
        return [((), {})]
    head, rest = items[0], elements(items[1:], sizes)
    if isinstance(head, str):
        heads = [((), {head: index}) for index in range(sizes[head])]
    else:
        heads = [((n, *path), index) for n, term in enumerate(head) for path, index in elements(term, sizes)]
    return [(path + more, index | other) for path, index in heads for more, other in rest]


@EXAMPLES
@given(tensors())
def test_views_say_what_the_notation_means(world):
    """Every element of a tensor belongs to one component at one index: the one that row-major order gives."""
    dims, sizes = world
    tensor = parse_tensor(" ".join(text_of(dim) for dim in dims))
    along = [elements(dim, sizes) for dim in dims]
    assert tensor.shape(sizes) == tuple(map(len, along))
    stored = list(product(*along))
    if len(stored) > 600:
        return
    paths = sorted({tuple(path for path, _ in element) for element in stored})
    assert tensor.components == len(paths)
    address = {}
    for at, element in enumerate(stored):
        index = {axis: i for _, part in element for axis, i in part.items()}
        address[paths.index(tuple(path for path, _ in element)), frozenset(index.items())] = at
    seen = np.zeros(len(stored), int)
    for component in range(tensor.components):
        axes = component_axes(tensor, component)
        views = view(tensor, component, sizes)
        rows = [prod(map(len, along[at + 1 :])) for at in range(len(along))]
        for index in product(*(range(sizes[axis]) for axis in axes)):
            named = dict(zip(axes, index, strict=True))
            found = sum(
                row * (dim.offset + sum(stride * named[axis] for axis, stride in dim.strides))
                for row, dim in zip(rows, views, strict=True)
            )
            assert address[component, frozenset(named.items())] == found
            seen[found] += 1
    assert (seen == 1).all()


@st.composite
def nested(draw):
    """Strides that nest, with gaps, from wide to narrow."""
    extents, width = [], 1
    for name in "abcd"[: draw(st.integers(0, 4))]:
        stride, size = width + draw(st.integers(0, 3)), draw(st.integers(0, 4))
        extents.append((name, stride, size))
        width = stride * (max(size, 1) - 1) + width
    return extents[::-1], draw(st.integers(-5, width + 5)), draw(st.integers(-5, width + 5))


@EXAMPLES
@given(nested())
def test_boxes_of_a_window(world):
    extents, low, high = world
    wanted = {
        index
        for index in product(*(range(size) for _, _, size in extents))
        if low <= sum(i * stride for i, (_, stride, _) in zip(index, extents, strict=True)) < high
    }
    found = nested_boxes(extents, low, high)
    inside = [index for box in found for index in product(*(range(*box[name]) for name, _, _ in extents))]
    assert len(inside) == len(set(inside))
    assert set(inside) == wanted
    assert len(found) <= max(1, 2 * len(extents) - 1)


@EXAMPLES
@given(nested(), st.integers(0, 7), st.data())
def test_boxes_of_ranges(world, offset, data):
    """The same, for a part of each axis."""
    extents, low, high = world
    ranges = {}
    for name, _, size in extents:
        start = data.draw(st.integers(0, size))
        ranges[name] = (start, data.draw(st.integers(start, size)))
    dim = DimView(offset, tuple((name, stride) for name, stride, _ in extents))
    wanted = {
        index
        for index in product(*(range(*ranges[name]) for name, _, _ in extents))
        if low <= offset + sum(i * stride for i, (_, stride, _) in zip(index, extents, strict=True)) < high
    }
    found = [
        index
        for box in boxes(dim, ranges, low, high)
        for index in product(*(range(*box[name]) for name, _, _ in extents))
    ]
    assert len(found) == len(wanted)
    assert set(found) == wanted


def test_qkv():
    equation = parse("(g q d) h, (g d) h, (g d) h -> (g (q d + d + d)) h")
    sizes = {"g": 2, "q": 3, "d": 4, "h": 5}
    (fused,) = equation.right
    assert fused.shape(sizes) == (40, 5)
    assert fused.components == 3
    assert component_axes(fused, 1) == ("g", "d", "h")
    assert view(fused, 2, sizes)[0] == DimView(16, (("g", 20), ("d", 1)))


def test_parts_that_change_places():
    """Where the order of the axes does not fit, components pair up by their axes."""
    equation = parse("(r + p) h -> (p + r) h")
    assert equation.order == (1, 0)
    assert (equation.components(0, 0), equation.components(1, 0)) == ((0, 1), (1, 0))
    assert parse("(f + f) h -> (f + f) h").order == (0, 1)
    assert parse("a, b, c -> (c + a + b)").components(1, 0) == (2, 0, 1)
    layout = [
        view(side[0], local, {"r": 2, "p": 5, "h": 3})[0]
        for side in (equation.left, equation.right)
        for local in (0, 1)
    ]
    assert layout == [
        DimView(0, (("r", 1),)), DimView(2, (("p", 1),)), DimView(0, (("p", 1),)), DimView(5, (("r", 1),)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="component 0 has axes"):
        parse("(r + p + p) h -> (p + p + r) h")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b", "one '->'"),
        ("a -> a -> a", "one '->'"),
        ("a, b -> (a + b", "an empty term or an open parenthesis"),
        ("a -> ()", "an empty term"),
        ("a -> (a + )", "an empty term"),
        ("a -> (", "an empty term"),
        ("a -> a)", "cannot read 'a)'"),
        ("a -> a + a", "cannot read"),
        ("a -> a*2", "cannot read"),
        ("2 -> 2", "cannot read"),
        ("a, a -> a", "2 components on the left, 1 on the right"),
        ("a b -> a", "component 0 has axes"),
        ("a a -> a", "component 0 has an axis twice"),
    ],
)
def test_what_does_not_parse(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        parse(text)


def test_the_axes_decide_where_the_order_does_not():
    """Two parts of the same size change places because their axes have names of their own."""
    equation = parse("o (b + a) -> o (a + b)")
    assert equation.components(0, 0) == (0, 1)
    assert equation.components(1, 0) == (1, 0)
    assert parse("o (a + b) -> o (a + b)").components(1, 0) == (0, 1)
    assert parse("(b + a), c -> c, (a + b)").components(1, 1) == (1, 0)
    # two components with the same axes cannot be told apart
    with pytest.raises(ValueError, match="component 0 has axes"):
        parse("(b + a + a) -> (a + a + b)")
    with pytest.raises(ValueError, match="component 1 has axes"):
        parse("o (b + a) -> o (b + c)")
