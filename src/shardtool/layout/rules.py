"""One rule: the tensors of one equation, named on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardtool.layout.equation import Equation, Tensor, parse

LAYER = "l"  # the axis of layers; rules with {l} in their names have one instance per layer


@dataclass(frozen=True, slots=True)
class Rule:
    """`hf` tensors -> one `megatron` tensor, by an equation; `{l}` in the names is the layer.

    `megatron` is the key that both formats use with Transformer Engine's spelling; the layout spells it for its format.
    `tp` names the axis that tensor parallelism shards; None means replicated.
    `copies` are other Hugging Face names under which the first tensor may also be on disk (a tied head).
    `tied_copy` is the key of the copy that the last pipeline stage keeps in per-rank files (tied embeddings).
    """

    hf: tuple[str, ...]
    equation: Equation
    megatron: str
    tp: str | None = None
    copies: tuple[str, ...] = ()
    tied_copy: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether there is one instance per layer."""
        return "{l}" in self.megatron

    @property
    def target(self) -> Tensor:
        """The Megatron side's tensor."""
        return self.equation.right[0]


def rule(
    hf: str | Iterable[str],
    equation: str,
    megatron: str,
    tp: str | None = None,
    *,
    copies: tuple[str, ...] = (),
    tied_copy: str | None = None,
) -> Rule:
    """A rule from its texts; ValueError where names and equation do not match."""
    names = (hf,) if isinstance(hf, str) else tuple(hf)
    parsed = parse(equation)
    if len(parsed.left) != len(names) or len(parsed.right) != 1:
        raise ValueError(f"{len(names)} names for {equation!r}: {names}")
    if any(("{l}" in name) != ("{l}" in megatron) for name in names):
        raise ValueError(f"a layer in the name on one side only: {names}, {megatron}")
    return Rule(names, parsed, megatron, tp, copies, tied_copy)
