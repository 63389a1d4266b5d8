"""What a source computes against what a target's config.json can say.

The target family writes the source's architecture into its config.json and reads it back. Each field that comes back
changed is a difference between the function of the one and what the other can express. For some differences there is an
identity: other weights with which the target computes the same (`IDENTITIES`). Anything else makes the translation
impossible, and its field is the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from shardtool.errors import ShardtoolError
from shardtool.families.architecture import Architecture
from shardtool.families.family import TRAINING_ONLY, Family, field_words, value_words
from shardtool.translate.rotary import STATIC, frequencies, whole_theta
from shardtool.translate.verdict import Step

BIASES = ("qkv_bias", "out_bias", "linear_bias")
IGNORED = TRAINING_ONLY | {"family", "centred_norms", *BIASES}


class DiffersError(Exception):
    """The target cannot be the source; one reason per difference."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class Match(Struct, frozen=True):
    """The architecture that the target's config.json will say, and what it takes to be the source's function."""

    target: Architecture
    steps: tuple[Step, ...] = ()


def match(a: Architecture, family: Family, scaling: Mapping[str, Any] | None = None) -> Match:
    """How the target family can be the source. Raises DiffersError with the reasons where it cannot.

    `scaling` is a rope scaling that is carried over as it is (`rotary.separate_scaling`).
    """
    if scaling is not None and family.own_rope:
        raise DiffersError(f"rope scaling {scaling['rope_type']}: {family.model_type} has code of its own without it")
    found = Match(replace(a, family=family.model_type))
    for _ in Architecture.__struct_fields__:
        back = _read_back(found.target, family)
        differing = [name for name in _NAMES if getattr(found.target, name) != getattr(back, name)]
        if not differing and biases(found.target) != biases(back):  # last: other identities need biases
            differing.append("biases")
        if not differing:
            if found.target.gated and not a.gated and not found.target.linear_bias:
                raise DiffersError(
                    "an MLP without gate: it needs a bias of 1 on up_proj, and the target's MLP has no biases"
                )
            return found
        found = _resolve(found, back, differing, family, scaling)
    raise AssertionError(f"{family.model_type} does not settle")


_NAMES = tuple(name for name in Architecture.__struct_fields__ if name not in IGNORED)


def _read_back(a: Architecture, family: Family) -> Architecture:
    """What the target's config.json says when this architecture is written into it."""
    try:
        return family.read_config(family.config(a, "float32"), megatron=False)
    except ShardtoolError as error:
        if a.rope is not None and a.rope.fraction != 1.0:
            return _read_back(replace(a, rope=replace(a.rope, fraction=1.0)), family)
        raise DiffersError(error.what) from error
    except (KeyError, AssertionError) as error:
        needs = [text for field, text in NEEDS.items() if getattr(a, field) is None]
        raise DiffersError(*needs or (f"its config has no entry {error}",)) from error


NEEDS = {
    "moe": "no experts: the target's layers are experts behind a router",
    "mla": "no latent attention: the target's queries, keys and values come from latent vectors",
    "rope": "learned positions: the target rotates its queries and keys",
}


def _resolve(
    found: Match, back: Architecture, differing: list[str], family: Family, scaling: Mapping[str, Any] | None
) -> Match:
    reasons: list[str] = []
    a, steps = found.target, list(found.steps)
    for name in differing:
        identity = IDENTITIES.get(name)
        answer = identity(a, back, scaling) if identity else None
        if answer is None or isinstance(answer, str):
            reasons.append(answer or _reason(name, a, back, family))
        else:
            a, added = answer
            steps += added
    if reasons:
        raise DiffersError(*reasons)
    return Match(a, tuple(steps))


def biases(a: Architecture) -> frozenset[str]:
    """Which linears have a bias."""
    parts = {"qkv": a.qkv_bias or a.linear_bias, "out": a.out_bias or a.linear_bias, "mlp": a.linear_bias}
    return frozenset(name for name, has in parts.items() if has)


def _reason(name: str, a: Architecture, back: Architecture, family: Family) -> str:
    """Why a difference in a field cannot be translated."""
    ours, theirs = getattr(a, name), getattr(back, name)
    if name in WHY:
        return WHY[name][bool(ours)]
    return f"{field_words(name)}: {value_words(ours)}; {family.model_type} would have {value_words(theirs)}"


# what a field that is there (True) or not there (False) in the source means for a target where it is the other way
WHY = {
    "moe": {
        True: "experts: a router chooses other weights for every token",
        False: "no experts: the target's layers are experts behind a router",
    },
    "mla": {
        True: "latent attention: queries and keys have parts without rope and norms inside",
        False: "no latent attention: the target's queries, keys and values come from latent vectors",
    },
    "qk_norm": {
        True: "qk-norm: queries and keys are divided by their own norm, which depends on the data",
        False: "no qk-norm: the target divides queries and keys by their own norm, which no weight undoes",
    },
    "no_rope_layers": {
        True: "per-layer rope: some layers rotate queries and keys, others do not",
        False: "the target has layers without rope",
    },
    "linear": {
        True: "linear attention: a state takes the place of keys and values",
        False: "the target has linear attention layers",
    },
    "output_gate": {
        True: "an output gate: attention is multiplied by a projection of its input",
        False: "no output gate: the target multiplies attention by a projection of its input",
    },
    "mtp_layers": {
        True: "multi-token-prediction layers: the target has none",
        False: "the target has multi-token-prediction layers",
    },
}

Answer: TypeAlias = tuple[Architecture, tuple[Step, ...]] | str | None  # None: the general reason
Identity: TypeAlias = Callable[[Architecture, Architecture, Mapping[str, Any] | None], Answer]


def _window(a: Architecture, back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    if back.window is not None or a.window is None:
        return None
    b = replace(a, window=None, window_layers=None, max_positions=min(a.max_positions, a.window))
    if a.window >= a.max_positions:
        return b, (Step(f"the sliding window of {a.window} tokens is never shorter than the sequence: left out"),)
    what = f"sequences of at most {a.window} tokens, the sliding window: max_position_embeddings says so"
    return b, (Step(what, "conditional"),)


def _window_layers(a: Architecture, back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    """The target has a window on all layers, or on none: up to its length that is the same."""
    if a.window is None or back.window != a.window or back.window_layers is not None:
        return (a, ()) if a.window is None else None
    b = replace(a, window_layers=None, max_positions=min(a.max_positions, a.window))
    what = f"sequences of at most {a.window} tokens, the sliding window of some layers: max_position_embeddings says so"
    return b, (Step(what, "conditional"),)


def _rope(a: Architecture, back: Architecture, scaling: Mapping[str, Any] | None) -> Answer:
    if a.rope is None or back.rope is None:
        return "learned positions: the other one rotates its queries and keys"
    rope, steps = a.rope, []
    if rope.fraction != back.rope.fraction:
        if back.rope.fraction != 1.0:
            return f"{rope.fraction:g} of each head rotates; the target rotates {back.rope.fraction:g} of it"
        kind = rope.scaling.kind if rope.scaling is not None else (scaling or {}).get("rope_type", "default")
        if kind not in STATIC:
            return f"rope on a part of each head with rope scaling {kind}: its frequencies are no fixed numbers"
        what = f"rope on {rope.fraction:g} of each head: the other pairs get the frequency 0 (longrope)"
        if (factor := frequencies(rope, a.head_dim, scaling).attention) != 1.0:
            what += f", and their rows of q are divided by the square of the attention factor {factor:.6g}"
        steps.append(Step(what, "exact"))
        rope = replace(rope, theta=whole_theta(rope), fraction=1.0, scaling=None)
    if rope.interleaved != back.rope.interleaved:
        order = "neighbouring dims" if rope.interleaved else "halves"
        steps.append(Step(f"rope pairs {order}: rows of q and k are put in the target's order", "exact"))
        rope = replace(rope, interleaved=back.rope.interleaved)
    if rope != replace(back.rope, fraction=rope.fraction, interleaved=rope.interleaved) and not steps:
        return f"rope {rope} cannot be said in the target's config: it would be {back.rope}"
    return replace(a, rope=rope), tuple(steps)


def _biases(a: Architecture, back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    """Biases that only one of the two has: zeros are written, and a source's must be zeros (`join`)."""
    return replace(a, **{name: getattr(back, name) for name in BIASES}), ()


def _norm(a: Architecture, _back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    if a.norm == "rms":
        return "RMSNorm: the target's LayerNorm subtracts a mean that this model keeps"
    what = (
        "LayerNorm as RMSNorm: what is added to the residual stream is centred (embedding rows, columns of o_proj and "
        "down_proj), the norms' biases go through the next linear into its bias"
    )
    # the head reads embeddings that are not centred; only norms with biases give the next linears some
    return replace(a, norm="rms", linear_bias=a.linear_bias or a.norm_weights, tied=False), (Step(what, "exact"),)


def _norm_weights(a: Architecture, _back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    """Norms without weights have ones: `join` writes them, or checks that a source's are."""
    return replace(a, norm_weights=not a.norm_weights), ()


def _gated(a: Architecture, _back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    if a.gated:
        return "a gated MLP: the target's has no gate"
    what = "an MLP without gate: it becomes the gate, up_proj is 0 with the bias 1"
    return replace(a, gated=True, linear_bias=True), (Step(what, "exact"),)


def _tied(a: Architecture, _back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    return (replace(a, tied=False), ()) if a.tied else "the head is not the embedding; the target's is"


def _folded(a: Architecture, back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    """Factors that a family has in its forward pass are codecs of its rules: the target has its own, or none."""
    tied = a.folded is not None and a.folded.tied
    return replace(a, folded=back.folded and replace(back.folded, tied=tied)), ()


def _softmax_scale(a: Architecture, back: Architecture, _: Mapping[str, Any] | None) -> Answer:
    if a.softmax_scale is None or back.softmax_scale is not None:
        return None
    what = f"attention scores times {a.softmax_scale:g}: q_proj takes up what that is more than 1 / sqrt(head dim)"
    return replace(a, softmax_scale=None), (Step(what, "exact"),)


IDENTITIES: dict[str, Identity] = {
    "window": _window,
    "window_layers": _window_layers,
    "rope": _rope,
    "biases": _biases,
    "norm": _norm,
    "norm_weights": _norm_weights,
    "gated": _gated,
    "tied": _tied,
    "folded": _folded,
    "softmax_scale": _softmax_scale,
}
