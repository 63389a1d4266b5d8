"""The layout of a Hugging Face directory: every tensor whole, one per name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shardtool.layout.layout import Layout, NameAxis, Piece
from shardtool.layout.rules import LAYER, Rule


def huggingface_layout(
    rules: tuple[Rule, ...], sizes: Mapping[str, int], present: Collection[str] = frozenset()
) -> Layout:
    """Where components live in a Hugging Face directory; `present` names tell which optional copies are on disk."""
    pieces = []
    for number, rule in enumerate(rules):
        names = (NameAxis(LAYER, tuple(range(sizes[LAYER]))),) if rule.per_layer else ()
        for tensor, name in enumerate(rule.hf):
            pieces.append(Piece(number, tensor, rule.equation.left[tensor], name, names=names))
        pieces += [
            Piece(number, 0, rule.equation.left[0], copy, replica=True) for copy in rule.copies if copy in present
        ]
    return Layout(rules, 0, sizes, tuple(pieces), description="Hugging Face")
