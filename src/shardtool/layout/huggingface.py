"""The layout of a Hugging Face directory: every tensor whole, one per name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shardtool.layout.layout import Layout, NameAxis, Piece
from shardtool.layout.rules import EXPERT, LAYER, MTP, Rule, named_axes


def huggingface_layout(
    rules: tuple[Rule, ...], sizes: Mapping[str, int], present: Collection[str] | None = None
) -> Layout:
    """Where components live in a Hugging Face directory.

    With `present` (the names on disk) the optional copies and aliases are those that are there; without, as for
    writing, all aliases and no copies. Multi-token-prediction layers are numbered from the rule's `mtp_start` on.
    """
    pieces = []
    for number, rule in enumerate(rules):
        for tensor, name in enumerate(rule.hf):
            dims = rule.equation.left[tensor].without(named_axes(name))
            constant = rule.constants[tensor] if rule.constants else None
            names = _names(rule, name, sizes)
            held = set(rule.equation.components(0, tensor))
            pieces.append(
                Piece(
                    number, tensor, dims, name, names=names, codec=rule.codec(tensor), constant=constant,
                    component_codecs=tuple(pair for pair in rule.component_codecs if pair[0] in held),
                )
            )  # fmt: skip
        for copy in (*rule.aliases, *rule.copies):
            names = _names(rule, copy, sizes)
            piece = Piece(number, 0, rule.equation.left[0], copy, names=names, replica=True, codec=rule.codec(0))
            wanted = copy in rule.aliases if present is None else any(key[1] in present for key in piece.all_keys())
            if wanted:
                pieces.append(piece)
    return Layout(rules, 0, sizes, tuple(pieces), description="Hugging Face")


def _names(rule: Rule, name: str, sizes: Mapping[str, int]) -> tuple[NameAxis, ...]:
    axes = {
        LAYER: NameAxis(LAYER, rule.ids(sizes[LAYER])),
        EXPERT: NameAxis(EXPERT, tuple(range(sizes.get(EXPERT, 0)))),
        MTP: NameAxis(MTP, tuple(range(sizes.get(MTP, 0))), -rule.mtp_start),
    }
    return tuple(axis for letter, axis in axes.items() if letter in named_axes(name))
