"""Two families' rules joined by their Megatron keys: two layouts of the same components.

Rule number n of the source's layout and rule number n of the target's are the same Megatron tensor, so that the planner
copies one into the other. What only one of them has is a constant: written into the target, checked in the source.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from shardtool.families.architecture import Architecture
from shardtool.families.blocks import FC1, LINEAR_QKV, Q_NORM
from shardtool.layout.codecs import CENTRED, Affine, Codec
from shardtool.layout.equation import Equation
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import Layout, Piece
from shardtool.layout.refine import refine
from shardtool.layout.rules import Rule
from shardtool.translate.match import DiffersError
from shardtool.translate.rotary import pair_sizes, row_order

Rules = tuple[Rule, ...]
Place = tuple[str, tuple[int, ...]]  # Megatron key, layers

QUERY, KEY = 0, 1  # components of linear_qkv
QUERY_REST = 1  # ... once queries are those that rotate, then those that do not
HEADED: dict[str, tuple[int, ...]] = {LINEAR_QKV + ".weight": (QUERY, KEY), LINEAR_QKV + ".bias": (QUERY, KEY)}
HEADED |= {Q_NORM.replace("q_", f"{name}_") + ".weight": (0,) for name in "qk"}
UNGATED = {FC1 + ".weight": (None, 0.0), FC1 + ".bias": (None, 1.0)}  # gate, up: silu(gate) * up without a gate


class Joined(Struct, frozen=True):
    """The two layouts."""

    src: Layout
    dst: Layout


def join(
    source: Architecture,
    ours: Rules,
    target: Architecture,
    theirs: Rules,
    sizes: Mapping[str, int],
    attention: float = 1.0,
) -> Joined:
    """Layouts of the source's and the target's tensors over the same components.

    The source's has every optional copy that a checkpoint may have. `attention` is the factor that its rope puts on the rows
    of queries and keys that rotate. Raises DiffersError where a tensor of one has no place in the other.
    """
    left, right = _by_place(ours, source.num_layers), _by_place(theirs, source.num_layers)
    given, wanted = _given(left), _given(right)
    numbers: dict[Place, int] = {}
    pairs: list[tuple[Rule, Rule]] = []
    reasons: list[str] = []
    for place in [*left, *(place for place in right if place not in left)]:
        if (place not in left and place in given) or (place not in right and place in wanted):
            continue
        try:
            pairs.append(_pair(left.get(place), right.get(place), source, target, attention))
            numbers[place] = len(pairs) - 1
        except DiffersError as error:
            reasons += error.reasons
    if reasons:
        raise DiffersError(*reasons)
    sizes = {**sizes, **_reordered(source, target)}
    a_rules, b_rules = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    every = frozenset(copy for rule in a_rules for copy in rule.copies + rule.aliases)
    src = huggingface_layout(a_rules, sizes, present=every)
    dst = huggingface_layout(b_rules, sizes)
    src = _with(src, {place: rule for place, rule in left.items() if place not in numbers}, wanted, numbers)
    dst = _with(dst, {place: rule for place, rule in right.items() if place not in numbers}, given, numbers)
    return Joined(
        replace(src, description=f"Hugging Face {source.family}"),
        replace(dst, description=f"Hugging Face {target.family}"),
    )


def scaled_queries(rules: Rules, factor: float) -> Rules:
    """The rules with the queries multiplied; DiffersError where they are no tensor of their own."""

    def scaled(rule: Rule) -> Rule:
        if _inner(rule.megatron) not in (f"{LINEAR_QKV}.weight", f"{LINEAR_QKV}.bias"):
            return rule
        if len(rule.hf) == 1 or rule.codecs:
            raise DiffersError("a scale of attention scores, with q, k and v in one tensor")
        return replace(rule, codecs=(Affine(factor), None, None))

    return tuple(map(scaled, rules))


def _by_place(rules: Rules, num_layers: int) -> dict[Place, Rule]:
    return {(rule.megatron, rule.ids(num_layers) if rule.per_layer else ()): rule for rule in rules}


def _given(rules: Mapping[Place, Rule]) -> dict[Place, tuple[Place, Codec | None]]:
    """The Megatron tensors that rules give besides their first: the place of the rule, and how its values are stored.

    These are embedding and head where a family has one tensor for both.
    """
    found: dict[Place, tuple[Place, Codec | None]] = {}
    for place, rule in rules.items():
        if rule.tied_copy:
            found[rule.tied_copy, ()] = (place, None)
        found |= {(key, ()): (place, codec) for key, codec in rule.derived}
    return found


def _with(
    layout: Layout,
    rules: Mapping[Place, Rule],
    given: Mapping[Place, tuple[Place, Codec | None]],
    numbers: Mapping[Place, int],
) -> Layout:
    """The layout with tensors that the other side has in one with another: replicas of that rule's tensor."""
    pieces = []
    for place, rule in rules.items():
        owner, codec = given[place]
        if owner not in numbers or (codec is not None and rule.codec(0) is not None):
            raise DiffersError(
                f"{rule.hf[0]}: embedding and head are one tensor on one side, with a factor between them"
            )
        stored = codec if rule.codec(0) is None else rule.codec(0)
        pieces.append(Piece(numbers[owner], 0, rule.equation.left[0], rule.hf[0], replica=True, codec=stored))
    return replace(layout, pieces=(*layout.pieces, *pieces))


def _reordered(source: Architecture, target: Architecture) -> dict[str, int]:
    """The sizes of a head's finer axes where the two have its rows in different orders; empty where they do not."""
    if source.rope is None or target.rope is None:
        return {}
    whole = source.rope.fraction != target.rope.fraction
    if not whole and source.rope.interleaved == target.rope.interleaved:
        return {}
    return pair_sizes(source.rope, source.head_dim)


def _pair(
    a: Rule | None, b: Rule | None, source: Architecture, target: Architecture, attention: float
) -> tuple[Rule, Rule]:
    """One Megatron tensor's rules on both sides."""
    if a is None or b is None:
        held = a or b
        assert held is not None
        value = _constant(held)
        if value is None:
            there, here = ("source", "target") if b is None else ("target", "source")
            raise DiffersError(f"{', '.join(held.hf)}: a tensor of the {there} that the {here} has not")
        stored = 0.0 if held.codec(0) == CENTRED else value
        full = replace(held, constants=(stored,) * len(held.hf), codecs=(), copies=(), aliases=())
        empty = replace(held, hf=(), equation=Equation((), held.equation.right, held.equation.text, ()), codecs=(),
                        copies=(), aliases=())  # fmt: skip
        return (full, empty) if b is None else (empty, full)
    if a.equation.order != b.equation.order and target.gated == source.gated:
        raise DiffersError(f"{', '.join(a.hf)}: its parts are in an order that the target's tensors do not have")
    if a.target != b.target:
        if not (target.gated and not source.gated and _inner(a.megatron) in UNGATED):
            raise DiffersError(f"{', '.join(a.hf)}: laid out in a way that the target's tensors are not")
        if len(b.hf) != len(UNGATED[_inner(a.megatron)]):
            raise DiffersError(
                "an MLP without gate: the target keeps gate and up in one tensor, half of which would be constant"
            )
        up = UNGATED[_inner(a.megatron)]
        return a, replace(b, constants=up)
    if _reordered(source, target) and _inner(a.megatron) in HEADED:
        assert source.rope is not None
        assert target.rope is not None
        components = HEADED[_inner(a.megatron)]
        whole = source.rope.fraction != target.rope.fraction
        order = row_order(replace(source.rope, interleaved=target.rope.interleaved), whole)
        a = replace(a, equation=refine(a.equation, "d", row_order(source.rope, False), components))
        if whole and attention != 1.0 and _inner(a.megatron) in _scaled(source):
            a = _rest_divided(a, attention)
        b = replace(b, equation=refine(b.equation, "d", order, components))
    return a, b


def _scaled(source: Architecture) -> tuple[str, ...]:
    """What the rows of the queries come from last: their norm, or their projection."""
    return (Q_NORM + ".weight",) if source.qk_norm else (LINEAR_QKV + ".weight", LINEAR_QKV + ".bias")


def _rest_divided(rule: Rule, attention: float) -> Rule:
    """The rule with the query rows that do not rotate divided by the square of a factor.

    Rope on whole heads multiplies every row of queries and keys with it, also those whose frequency is 0: together they
    get its square too many.
    """
    if any(rule.codecs):
        raise DiffersError(f"{rule.hf[0]}: an attention factor of rope, and values that are folded already")
    return replace(rule, component_codecs=((QUERY_REST, Affine(attention**-2)),))


def _constant(rule: Rule) -> float | None:
    """What a tensor is that changes nothing: a bias of zeros, a norm's weight of ones."""
    if rule.gamma:
        return 1.0
    return 0.0 if rule.megatron.endswith("bias") else None


def _inner(megatron: str) -> str:
    """A key within its layer."""
    return megatron.rsplit("}.", maxsplit=1)[-1]
