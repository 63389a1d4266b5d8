"""Refining an axis: in some components of a tensor, one axis becomes a product of finer ones.

The rows of a head, `d`, are pairs for rotary embedding: `(half pair)` where the first halves stand together, `(pair half)`
where the two of a pair are neighbours. Written so on both sides of a plan, the order of rows is one more relayout.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from shardtool.layout.equation import Equation, Factor, Product, Sum, Tensor, choices


def refine(equation: Equation, axis: str, finer: Product, components: Collection[int]) -> Equation:
    """The equation with `axis` replaced by `finer` on the left side, in the components with these numbers.

    A sum in `finer` makes more components: those of one `axis` take the place of the old one. The right side stays as
    it is and is no longer the same components. ValueError where components that keep the axis share it with others.
    """
    start, left = 0, []
    for tensor in equation.left:
        left.append(_tensor(tensor, axis, finer, frozenset(number - start for number in components)))
        start += tensor.components
    text = f"{', '.join(map(unparse, left))} -> {_right(equation)}"
    return Equation(tuple(left), equation.right, text, tuple(range(sum(tensor.components for tensor in left))))


def _right(equation: Equation) -> str:
    return equation.text.split("->")[1].strip()


def _tensor(tensor: Tensor, axis: str, finer: Product, components: frozenset[int]) -> Tensor:
    if sum(choices(dim) > 1 for dim in tensor.dims) > 1:
        raise ValueError(f"sums in two dims: {unparse(tensor)}")
    numbers = tuple(range(tensor.components))
    dims = tuple(_product(dim, axis, finer, components, numbers) for dim in tensor.dims)
    return replace(tensor, dims=dims)


def _product(
    product: Product, axis: str, finer: Product, components: frozenset[int], numbers: tuple[int, ...]
) -> Product:
    """A product that stands for the components `numbers`, or for one choice of each where it has no sum."""
    if sum(isinstance(factor, Sum) and choices((factor,)) > 1 for factor in product) > 1:
        raise ValueError("two sums in one product")
    made: list[Factor] = []
    for factor in product:
        if isinstance(factor, Sum):
            terms, at = [], 0
            for term in factor.terms:
                count = choices(term) if choices((factor,)) > 1 else len(numbers)
                terms.append(_product(term, axis, finer, components, numbers[at : at + count]))
                at += count if choices((factor,)) > 1 else 0
            made.append(Sum(tuple(terms)))
        elif factor != axis or components.isdisjoint(numbers):
            made.append(factor)
        elif components.issuperset(numbers):
            made += finer
        else:
            raise ValueError(f"components share the axis {axis}")
    return tuple(made)


def unparse(tensor: Tensor) -> str:
    """A tensor's text."""
    return " ".join(_text(dim[0]) if len(dim) == 1 else f"({_term(dim)})" for dim in tensor.dims)


def _term(product: Product) -> str:
    return " ".join(map(_text, product)) or "1"


def _text(factor: Factor) -> str:
    if isinstance(factor, str):
        return factor
    return "1" if factor.terms == ((),) else f"({' + '.join(map(_term, factor.terms))})"
