"""One rule: the tensors of one equation, named on both sides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from msgspec import Struct

from shardtool.layout.codecs import Codec
from shardtool.layout.equation import Equation, Sum, Tensor, parse

LAYER, EXPERT, MTP = "l", "e", "m"  # the axes that stand in names: layers, experts, multi-token-prediction layers


class Part(Struct, frozen=True):
    """A tensor of torch_dist: the ending of its key, the number of its first component, and its layout."""

    ending: str
    first: int
    tensor: Tensor


class Rule(Struct, frozen=True):
    """`hf` tensors -> one `megatron` tensor, by an equation; `{l}`, `{e}`, `{m}` in the names are the name axes.

    `megatron` is the key of per-rank files in Transformer Engine's spelling; the layout spells it for its format.
    An axis that is in a tensor's name is no dim of that tensor: equations that mention it stand for both forms.
    `tp` names the axis that tensor parallelism shards (expert tensor parallelism for experts); None means replicated;
    `tp_local` is the same for the local spec where it differs. `layers` are the layers that have it (None: all).
    `copies` are other Hugging Face names under which the first tensor may also be on disk (a tied head); `aliases`
    are names under which it always is. `dist_aliases` are other torch_dist keys of the same tensor, both written and read.
    `tied_copy` is the key of the copy that the last pipeline stage keeps in per-rank files (tied embeddings).
    `keep_dtype` exempts it from casts. `codecs` say how the Hugging Face tensors store their values, one each (empty:
    as they are). `dist_parts` are the keys' endings in torch_dist where megatron-core keeps each term of the first dim's
    sum as a tensor of its own. `mtp_start` is the number of the first multi-token-prediction layer in the Hugging Face
    names. `derived` are further Megatron tensors with the same components behind a codec, (key, codec): written
    like the first, compared with it on reading. `constants` has a number for each Hugging Face tensor that is that
    number everywhere and holds no component (empty: none is); where all are, the Megatron key is of no stored tensor.
    `component_codecs` are codecs of single components of the Hugging Face tensors, by number, in the place of their tensor's.
    """

    hf: tuple[str, ...]
    equation: Equation
    megatron: str
    tp: str | None = None
    copies: tuple[str, ...] = ()
    tied_copy: str | None = None
    tp_local: str | None = None
    layers: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()
    dist_aliases: tuple[str, ...] = ()
    keep_dtype: bool = False
    codecs: tuple[Codec | None, ...] = ()
    derived: tuple[tuple[str, Codec | None], ...] = ()
    dist_parts: tuple[str, ...] = ()
    mtp_start: int = 0
    constants: tuple[float | None, ...] = ()
    component_codecs: tuple[tuple[int, Codec], ...] = ()

    @property
    def gamma(self) -> bool:
        """Whether it is the scale of a norm, which Megatron may store as gamma - 1 (apply_layernorm_1p)."""
        return re.search(r"(layer_norm_|norm\.)weight$", self.megatron) is not None

    def codec(self, tensor: int) -> Codec | None:
        """The codec of one of its Hugging Face tensors."""
        return self.codecs[tensor] if self.codecs else None

    @property
    def constant(self) -> bool:
        """Whether it holds no component at all: Megatron has no such tensor."""
        return bool(self.constants) and None not in self.constants

    @property
    def per_layer(self) -> bool:
        """Whether there is one instance per layer."""
        return "{l}" in self.megatron

    @property
    def per_expert(self) -> bool:
        """Whether there is one instance per expert."""
        return "{e}" in self.megatron

    @property
    def per_mtp(self) -> bool:
        """Whether it belongs to the multi-token-prediction layers."""
        return "{m}" in self.megatron

    @property
    def target(self) -> Tensor:
        """The Megatron side's tensor, without the axes in its name."""
        return self.equation.right[0].without(frozenset(NAME_AXES & named_axes(self.megatron)))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors of torch_dist that make up the Megatron tensor: one, or one for each of `dist_parts`."""
        if not self.dist_parts:
            return (Part("", 0, self.target),)
        (total,), *rest = self.target.dims
        assert isinstance(total, Sum) and len(total.terms) == len(self.dist_parts)
        tensors = [Tensor((term, *rest)) for term in total.terms]
        starts = accumulate((tensor.components for tensor in tensors), initial=0)
        return tuple(
            Part("." + end, *pair)
            for end, pair in zip(self.dist_parts, zip(starts, tensors, strict=False), strict=True)
        )

    def ids(self, num_layers: int) -> tuple[int, ...]:
        """The layers that have it."""
        return tuple(range(num_layers)) if self.layers is None else self.layers


NAME_AXES = frozenset({LAYER, EXPERT, MTP})


def named_axes(name: str) -> frozenset[str]:
    """The axes in a name."""
    return frozenset(axis for axis in NAME_AXES if "{" + axis + "}" in name)


def rule(hf: str | Iterable[str], equation: str, megatron: str, tp: str | None = None, **options: Any) -> Rule:
    """A rule from its texts; ValueError where names and equation do not match. `options` are the other fields of Rule."""
    names = (hf,) if isinstance(hf, str) else tuple(hf)
    parsed = parse(equation)
    if len(parsed.left) != len(names) or len(parsed.right) != 1:
        raise ValueError(f"{len(names)} names for {equation!r}: {names}")
    # experts may be numbered on one side and stacked on the other; an only MTP layer may have no number
    if any((named_axes(name) ^ named_axes(megatron)) - {EXPERT, MTP} for name in names):
        raise ValueError(f"a layer in the name on one side only: {names}, {megatron}")
    return Rule(names, parsed, megatron, tp, **options)
