"""LayerNorm as RMSNorm: the source seen as a model that has RMSNorms.

LayerNorm of x is RMSNorm of x - mean(x). So whatever is added to the residual stream is centred: the rows of the
embedding, the columns of the two output projections (the mean over the hidden outputs), and their biases. A norm's bias
b comes out of the next linear as W b, which joins that linear's bias. The final norm has no linear with a bias behind
it: its bias must be 0. A tied head keeps the embedding's rows as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from shardtool.checkpoint.opened import Header, Opened
from shardtool.families.blocks import EMBEDDING, FC1, FC2, INPUT_NORM, LINEAR_OUT, LINEAR_QKV, MLP_NORM, OUTPUT
from shardtool.formats.stored import Product, Stored
from shardtool.layout.codecs import Centred
from shardtool.layout.equation import Equation
from shardtool.layout.layout import Key
from shardtool.layout.refine import unparse
from shardtool.layout.rules import LAYER, Rule
from shardtool.translate.match import DiffersError

WRITES = (EMBEDDING, *(f"{linear}.{kind}" for linear in (LINEAR_OUT, FC2) for kind in ("weight", "bias")))
Rules = tuple[Rule, ...]
BEHIND = {INPUT_NORM + "_bias": LINEAR_QKV, MLP_NORM + "_bias": FC1}  # the linear that reads what a norm gives


def without_layer_norms(rules: Rules) -> Rules:
    """The rules of the source as an RMSNorm model: its tensors seen through codecs, and biases that are computed."""
    by_key = {_inner(rule.megatron): rule for rule in rules}
    biases = _biases(by_key)
    made: list[Rule] = []
    for rule in rules:
        key = _inner(rule.megatron)
        if key not in BEHIND and key not in biases:
            made += _centred(rule, key)
    return (*made, *(by_key.get(key) or _bias_rule(_weight(key, by_key)) for key in biases))


def with_biases(rules: Rules, opened: Opened) -> Opened:
    """The source with the biases that it has without LayerNorms; `rules` are those with them."""
    by_key = {_inner(rule.megatron): rule for rule in rules}
    found: dict[str, Stored] = {}
    for key, norm in _biases(by_key).items():
        weight = _weight(key, by_key)
        bias = by_key.get(key) or _bias_rule(weight)
        found |= _products(weight, bias, by_key[norm], opened, own=key in by_key)
    computed: dict[Key, Header] = {("", name, ()): Header(item.shape, item.dtype) for name, item in found.items()}
    headers = {**opened.headers, **computed}

    def locate(key: Key) -> Stored:
        return found.get(key[1]) or opened.locate(key)

    return replace(opened, headers=headers, locate=locate)


def _biases(by_key: Mapping[str, Rule]) -> dict[str, str]:
    """The keys of the biases that take up a norm's bias, and the norm's."""
    return {f"{linear}.bias": norm for norm, linear in BEHIND.items() if norm in by_key}


def _weight(bias: str, by_key: Mapping[str, Rule]) -> Rule:
    return by_key[bias.removesuffix("bias") + "weight"]


def _inner(megatron: str) -> str:
    return megatron.rsplit("}.", maxsplit=1)[-1]


def _centred(rule: Rule, key: str) -> Iterator[Rule]:
    if rule.codecs and key in WRITES:
        raise DiffersError(f"{rule.hf[0]}: a factor of its own, and centred for RMSNorm")
    if key == EMBEDDING:
        yield replace(rule, codecs=(Centred(),), copies=(), tied_copy=None)
        if rule.tied_copy or rule.copies:  # a tied head: the same tensor, as it is
            yield replace(rule, megatron=OUTPUT, copies=(), tied_copy=None)
    elif key in (f"{LINEAR_OUT}.weight", f"{FC2}.weight"):
        yield replace(rule, codecs=(Centred(columns=True),))
    elif key in (f"{LINEAR_OUT}.bias", f"{FC2}.bias"):
        yield replace(rule, codecs=(Centred(),))
    else:
        yield rule


def _bias_rule(weight: Rule) -> Rule:
    """The rule that a linear's biases would have: the weight's without its inputs."""
    inputs = frozenset("h")
    left, right = (tuple(t.without(inputs) for t in side) for side in (weight.equation.left, weight.equation.right))
    text = " -> ".join(", ".join(map(unparse, side)) for side in (left, right))
    names = tuple(_as_bias(name) for name in weight.hf)
    return replace(
        weight,
        hf=names,
        equation=Equation(left, right, text, weight.equation.order),
        megatron=_as_bias(weight.megatron),
    )


def _as_bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _products(weight: Rule, bias: Rule, norm: Rule, opened: Opened, *, own: bool) -> Mapping[str, Stored]:
    """The biases by name: of every layer and tensor, the matrix times the norm's bias, and the bias that was there."""
    made = {}
    for layer in weight.ids(opened.layout.sizes[LAYER]):
        vector = opened.locate(_key(norm.hf[0], layer))
        for matrix_name, bias_name in zip(weight.hf, bias.hf, strict=True):
            matrix = opened.locate(_key(matrix_name, layer))
            old = opened.locate(_key(bias_name, layer)) if own else None
            form = Product(matrix, vector, old)
            made[_key(bias_name, layer)[1]] = Stored(
                matrix.file, matrix.offset, matrix.shape[:1], matrix.dtype, quantised=form
            )
    return made


def _key(name: str, layer: int) -> Key:
    return "", name.replace("{l}", str(layer)), ()
