"""Other ways to lay out the tensor of a rule: what a tool that gets the layout wrong would have written.

A variant is tried by laying out one side's components in it and comparing that, byte for byte as a fingerprint, with
the other side's components in the right layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

from msgspec import Struct

from shardtool.diff.permutations import Diagnosis
from shardtool.layout.equation import Product, Sum, Tensor
from shardtool.layout.rules import Rule

Cut = Mapping[str, Any]  # fields of a Piece


class Variant(Struct, frozen=True):
    """A layout of a rule's tensor: term k of it is the rule's component `order[k]`.

    `windows`: tensor parallel ranks have equal blocks of rows of it, whatever the components are.
    """

    diagnosis: Diagnosis
    dims: Tensor
    order: tuple[int, ...]
    windows: bool = False


def variants(rule: Rule, names: Sequence[str]) -> Iterator[Variant]:
    """The variants of a rule's Megatron tensor; `names` are those of its components."""
    target = rule.target
    right = tuple(range(target.components))
    at = sum_dim(target)
    if at is not None and target.components == len(_terms(target.dims[at])[1]):
        outer, terms = _terms(target.dims[at])
        for dims, order, code, text in _arranged(outer, terms, names):
            changed = Tensor((*target.dims[:at], dims, *target.dims[at + 1 :]))
            for windows in (False, True):
                if (changed, order, windows) != (target, right, False):
                    cut = ", then cut into equal blocks of rows" if windows else ""
                    yield Variant(Diagnosis(code, text + cut), changed, order, windows)
    if len(target.dims) == 2:
        yield Variant(Diagnosis("transposed", "transposed"), Tensor(target.dims[::-1]), right)


def sum_dim(target: Tensor) -> int | None:
    """The dim in which components lie side by side; None where there is none, or more than one."""
    found = [at for at, dim in enumerate(target.dims) if any(isinstance(factor, Sum) for factor in dim)]
    return found[0] if len(found) == 1 else None


def _terms(dim: Product) -> tuple[Product, tuple[Product, ...]]:
    """(axes before the sum, the terms with the axes after it): `(g (q d + d + d))` is (g), (q d, d, d)."""
    place = next(at for at, factor in enumerate(dim) if isinstance(factor, Sum))
    total = dim[place]
    assert isinstance(total, Sum)
    return dim[:place], tuple(term + dim[place + 1 :] for term in total.terms)


def _arranged(
    outer: Product, terms: tuple[Product, ...], names: Sequence[str]
) -> Iterator[tuple[Product, tuple[int, ...], str, str]]:
    """Every order of the terms: within each index of the outer axes, one after the other, and element by element."""
    listed = len(names) == len(terms)
    code = "gate_up_order" if len(terms) == 2 else "qkv_order"
    for order in permutations(range(len(terms))):
        mine = tuple(terms[k] for k in order)
        said = ", ".join(names[k] if listed else f"part {k}" for k in order)
        if outer and all(isinstance(factor, str) for factor in outer):
            yield (*outer, Sum(mine)), order, code, f"in the order {said} within each group"
        yield (
            (Sum(tuple(outer + term for term in mine)),),
            order,
            code,
            f"one after the other: all {said.replace(', ', ', all ')}",
        )
        inner = _common_end(mine)
        if inner and all(isinstance(factor, str) for factor in inner):
            rows = (*outer, *inner, Sum(tuple(term[: len(term) - len(inner)] for term in mine)))
            yield rows, order, code.replace("order", "interleaved"), f"rows of {said} in turn"


def _common_end(terms: tuple[Product, ...]) -> Product:
    """The axes with which all terms end."""
    count = 0
    while all(len(term) > count for term in terms) and len({term[len(term) - count - 1] for term in terms}) == 1:
        count += 1
    return terms[0][len(terms[0]) - count :]
