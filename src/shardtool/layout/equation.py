"""Equations: how components with named axes are laid out in stored tensors.

    "(g q d) h, (g d) h, (g d) h -> (g (q d + d + d)) h"

A side is a list of tensors, separated by commas. A tensor is a list of dims, separated by blanks. A dim is an axis,
or a parenthesised product of axes (row-major: the last varies fastest) and parenthesised sums of products; `1` is one
element, so that `(f (1 + 1))` alternates two components.
Every choice of one term per sum is one *component*; components are numbered from left to right, and component k of
the left side is component k of the right side. Where their axes do not agree in that order but do in another, the axes
decide: `(r + p) h -> (p + r) h` exchanges two parts. Sums and products are affine, so a component is one strided view
of its tensor: `address = offset + sum(stride[axis] * index[axis])`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import prod
from typing import TypeAlias

from msgspec import Struct


class Sum(Struct, frozen=True):
    """Terms side by side along one dim."""

    terms: tuple[Product, ...]


Factor: TypeAlias = str | Sum
Product: TypeAlias = tuple[Factor, ...]


class Tensor(Struct, frozen=True):
    """A stored tensor: one product per dim."""

    dims: tuple[Product, ...]

    @property
    def components(self) -> int:
        """The number of components that it holds."""
        return prod(choices(dim) for dim in self.dims)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape, given the size of each axis."""
        return tuple(product_size(dim, sizes) for dim in self.dims)

    def without(self, axes: frozenset[str]) -> Tensor:
        """The tensor without the dims that are one of `axes` alone."""
        return Tensor(tuple(dim for dim in self.dims if not (len(dim) == 1 and dim[0] in axes)))


class DimView(Struct, frozen=True):
    """One component along one dim: `index = offset + sum(stride * axis)`, strides from the largest to the smallest."""

    offset: int
    strides: tuple[tuple[str, int], ...]


class Equation(Struct, frozen=True):
    """Two sides that hold the same components. `order` gives the left side's number of each component of the right."""

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    text: str
    order: tuple[int, ...]

    def components(self, side: int, tensor: int) -> tuple[int, ...]:
        """The numbers of the components in tensor number `tensor` of the left side (0) or the right (1), in its order."""
        tensors = self.right if side else self.left
        start = sum(other.components for other in tensors[:tensor])
        numbers = range(start, start + tensors[tensor].components)
        return tuple(self.order[number] for number in numbers) if side else tuple(numbers)


@cache
def parse(text: str) -> Equation:
    """An equation from its text.

    Raises ValueError when it does not parse, when the sides differ in components or in a component's axes,
    or when an axis occurs twice in a component.
    """
    halves = text.split("->")
    if len(halves) != 2:
        raise ValueError(f"an equation has one '->': {text!r}")
    left, right = (tuple(parse_tensor(part) for part in half.split(",")) for half in halves)
    axes_left, axes_right = ([axes for tensor in side for axes in _component_axes(tensor)] for side in (left, right))
    if len(axes_left) != len(axes_right):
        raise ValueError(f"{len(axes_left)} components on the left, {len(axes_right)} on the right: {text!r}")
    for number, axes in (*enumerate(axes_left), *enumerate(axes_right)):
        if len(set(axes)) != len(axes):
            raise ValueError(f"component {number} has an axis twice: {text!r}")
    return Equation(left, right, text, _order(axes_left, axes_right, text))


def _order(left: Sequence[Sequence[str]], right: Sequence[Sequence[str]], text: str) -> tuple[int, ...]:
    """The left side's number of each component of the right side: the same, or the one with the same axes."""
    ours, theirs = [frozenset(axes) for axes in left], [frozenset(axes) for axes in right]
    if ours == theirs:
        return tuple(range(len(ours)))
    numbers = {axes: number for number, axes in enumerate(ours)}
    if len(numbers) == len(ours) and numbers.keys() == set(theirs):
        return tuple(numbers[axes] for axes in theirs)
    number = next(number for number, axes in enumerate(ours) if axes != theirs[number])
    raise ValueError(f"component {number} has axes {sorted(ours[number])} and {sorted(theirs[number])}: {text!r}")


@cache
def parse_tensor(text: str) -> Tensor:
    """One tensor from its text; ValueError when it does not parse."""
    tokens = re.findall(r"[()+]|\w+|\S", text)
    factors, rest = _product(tokens, text)
    if rest or any(isinstance(token, str) and not token.isidentifier() for token in tokens if token not in "()+1"):
        raise ValueError(f"cannot read {text.strip()!r}")
    dims = tuple(
        factor.terms[0] if isinstance(factor, Sum) and len(factor.terms) == 1 else (factor,) for factor in factors
    )
    return Tensor(dims)


def _product(tokens: list[str], text: str) -> tuple[Product, list[str]]:
    factors: list[Factor] = []
    while tokens and tokens[0] not in ")+":
        if tokens[0] == "(":
            terms = []
            while tokens[0] in "(+":
                term, tokens = _product(tokens[1:], text)
                if not term or not tokens:
                    raise ValueError(f"an empty term or an open parenthesis in {text.strip()!r}")
                terms.append(term)
                if tokens[0] == ")":
                    break
            tokens = tokens[1:]
            factors.append(Sum(tuple(terms)))
        else:
            factors.append(Sum(((),)) if tokens[0] == "1" else tokens[0])
            tokens = tokens[1:]
    return tuple(factors), tokens


def product_size(product: Product, sizes: Mapping[str, int]) -> int:
    """The number of elements along a product of axes and sums."""
    size = 1
    for factor in product:
        size *= sizes[factor] if isinstance(factor, str) else sum(product_size(term, sizes) for term in factor.terms)
    return size


@cache
def choices(product: Product) -> int:
    """The number of choices of one term per sum in a product."""
    return prod(sum(choices(term) for term in factor.terms) for factor in product if isinstance(factor, Sum))


def _paths(product: Product) -> Iterator[tuple[str, ...]]:
    """The axes of each choice of terms, in order."""
    if not product:
        yield ()
        return
    head, tail = product[0], product[1:]
    heads = [(head,)] if isinstance(head, str) else [path for term in head.terms for path in _paths(term)]
    for path in heads:
        for rest in _paths(tail):
            yield path + rest


@cache
def _component_axes(tensor: Tensor) -> tuple[tuple[str, ...], ...]:
    whole: Product = tuple(factor for dim in tensor.dims for factor in dim)
    return tuple(_paths(whole))


def component_axes(tensor: Tensor, component: int) -> tuple[str, ...]:
    """The axes of a component of a tensor."""
    return _component_axes(tensor)[component]


def view(tensor: Tensor, component: int, sizes: Mapping[str, int]) -> tuple[DimView, ...]:
    """Where component number `component` of a tensor lies, per dim, when axes have these sizes."""
    views = []
    remaining = component
    counts = [choices(dim) for dim in tensor.dims]
    for position, dim in enumerate(tensor.dims):
        later = prod(counts[position + 1 :])
        choice, remaining = divmod(remaining, later)
        offset, strides, _ = _view_product(dim, choice, sizes)
        views.append(DimView(offset, tuple(sorted(strides, key=lambda item: -item[1]))))
    return tuple(views)


def _view_product(product: Product, choice: int, sizes: Mapping[str, int]) -> tuple[int, list[tuple[str, int]], int]:
    """(offset, [(axis, stride)], size) of one choice of a product's terms."""
    offset, strides, size = 0, [], 1
    for position in range(len(product) - 1, -1, -1):
        factor = product[position]
        if isinstance(factor, str):
            strides.append((factor, size))
            size *= sizes[factor]
            continue
        # choices are numbered with the leftmost sum as the most significant digit
        digits = sum(choices(term) for term in factor.terms)
        choice, digit = divmod(choice, digits)
        start = 0
        for term in factor.terms:
            if digit < choices(term):
                inner_offset, inner_strides, _ = _view_product(term, digit, sizes)
                offset += (start + inner_offset) * size
                strides += [(axis, stride * size) for axis, stride in inner_strides]
                break
            digit -= choices(term)
            start += product_size(term, sizes)
        size *= sum(product_size(term, sizes) for term in factor.terms)
    return offset, strides, size


def boxes(dim: DimView, ranges: Mapping[str, tuple[int, int]], low: int, high: int) -> list[dict[str, tuple[int, int]]]:
    """The boxes of axis ranges whose indices along a dim lie in [low, high).

    `ranges` bounds each axis of the dim. A contiguous range of rows cuts a product of k axes into at most 2 k - 1.
    """
    base = dim.offset + sum(stride * ranges[axis][0] for axis, stride in dim.strides)
    extents = [(axis, stride, ranges[axis][1] - ranges[axis][0]) for axis, stride in dim.strides]
    return [
        {axis: (lo + ranges[axis][0], hi + ranges[axis][0]) for axis, (lo, hi) in box.items()}
        for box in nested_boxes(extents, low - base, high - base)
    ]


def nested_boxes(extents: Sequence[tuple[str, int, int]], low: int, high: int) -> list[dict[str, tuple[int, int]]]:
    """The boxes of indices with low <= sum(stride * index) < high, for (axis, stride, extent) from wide to narrow.

    The strides must nest, each at least as wide as all that is inside it, as those of a view of distinct elements do.
    """
    whole = {axis: (0, extent) for axis, _, extent in extents}
    return [whole | box for box in _boxes([item for item in extents if item[2] != 1], low, high)]


def _boxes(extents: list[tuple[str, int, int]], low: int, high: int) -> list[dict[str, tuple[int, int]]]:
    if any(extent <= 0 for _, _, extent in extents) or low >= high:
        return []
    if not extents:
        return [{}] if low <= 0 < high else []
    (axis, stride, extent), inner = extents[0], extents[1:]
    width = 1 + sum((inner_extent - 1) * inner_stride for _, inner_stride, inner_extent in inner)
    first = max(0, -(-low // stride))  # the first index whose block begins inside
    last = min(extent, (high - width) // stride + 1)  # one past the last whose block ends inside
    found = []
    if first < last:
        found.append({axis: (first, last)} | {name: (0, size) for name, _, size in inner})
    edges = sorted({low // stride, (high - 1) // stride})
    for edge in edges:
        if 0 <= edge < extent and not first <= edge < last:
            start = edge * stride
            found += [{axis: (edge, edge + 1)} | box for box in _boxes(inner, low - start, high - start)]
    return found
