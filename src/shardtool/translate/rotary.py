"""Rotary embedding between families: the order of a head's rows, and frequencies that a config.json can say.

Reference: transformers `modeling_rope_utils.py`, the same from 4.43 to 5.23 in what is used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shardtool.families.architecture import Rope
from shardtool.families.family import Config, Family
from shardtool.layout.equation import Product, Sum

HALF, PAIR, REST = "half", "pair", "rest"  # the two of a pair, the pairs that are rotated, those that are not
STILL = 1e30  # a frequency divided by this does not rotate: position / 1e30 is 0 in fp32
STATIC = ("default", "linear", "llama3", "yarn", "longrope")  # scalings with fixed frequencies for every pair
TABLED = ("default", "linear")  # scalings that every family's table reads; others are carried as they are


def row_order(rope: Rope, whole: bool) -> Product:
    """The rows of a query or key head, from the finer axes. `whole`: the rows that do not rotate stand in pairs too,
    as they must where the frequencies of a whole head say which pairs are still."""
    if whole and rope.fraction != 1.0:
        every = Sum(((PAIR,), (REST,)))
        return (every, HALF) if rope.interleaved else (HALF, every)
    rotated = (PAIR, HALF) if rope.interleaved else (HALF, PAIR)
    return rotated if rope.fraction == 1.0 else (Sum((rotated, (HALF, REST))),)


def pair_sizes(rope: Rope, head_dim: int) -> dict[str, int]:
    """The sizes of the finer axes; ValueError where the rows are no pairs."""
    rotated = int(head_dim * rope.fraction)
    if rotated % 2 or (head_dim - rotated) % 2:
        raise ValueError(f"{rotated} of {head_dim} rows of a head rotate: they are no pairs")
    return {HALF: 2, PAIR: rotated // 2, REST: (head_dim - rotated) // 2}


def separate_scaling(config: Config, family: Family) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A config.json without the rope scaling that only transformers' own code needs to know, and that scaling.

    Both dialects are read. The scaling has its `rope_type`, and what would be taken from elsewhere in the config.
    """
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind in TABLED or family.own_rope:
        return dict(config), None
    outer = ("rope_theta", "partial_rotary_factor")
    scaling = {"rope_type": kind} | {key: value for key, value in given.items() if key not in (*outer, "type")}
    plain = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    plain |= {key: given[key] for key in outer if given.get(key) is not None}
    if kind in ("llama3", "yarn", "longrope"):
        positions = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        longest = config.get("max_position_embeddings")
        if positions or longest:
            scaling["original_max_position_embeddings"] = positions or longest
        if kind == "yarn" and scaling.get("factor") is None and longest:
            scaling["factor"] = longest / scaling["original_max_position_embeddings"]
        if kind == "longrope":
            scaling["attention_factor"] = attention_factor(scaling, longest)
    return plain, scaling


def attention_factor(scaling: Mapping[str, Any], longest: int | None) -> float:
    """What cos and sin are multiplied with under longrope (transformers `_compute_longrope_parameters`)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or (longest or original) / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


class Frequencies(NamedTuple):
    """What the frequencies of the pairs that rotate are divided by, up to `original` positions and beyond, and what cos
    and sin are multiplied with."""

    short: Sequence[float]
    long: Sequence[float]
    attention: float = 1.0
    original: int | None = None


def frequencies(rope: Rope, head_dim: int, scaling: Mapping[str, Any] | None) -> Frequencies:
    """A rope scaling as numbers for each pair: one of `STATIC`, as the family's table reads it or as config.json has it."""
    pairs = int(head_dim * rope.fraction) // 2
    if rope.scaling is not None and rope.scaling.kind == "linear":
        slower = [rope.scaling.factor] * pairs
        return Frequencies(slower, slower)
    kind = (scaling or {}).get("rope_type", "default")
    if scaling is None or kind not in STATIC or kind == "default":
        plain = [1.0] * pairs
        return Frequencies(plain, plain)
    if kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        return Frequencies(scaling["short_factor"], scaling["long_factor"], scaling["attention_factor"], original)
    kept = _yarn(rope, pairs, scaling) if kind == "yarn" else _llama3(rope, pairs, scaling)
    factors = [1 / ((1 - share) / scaling["factor"] + share) for share in kept]
    return Frequencies(factors, factors, _yarn_attention(scaling) if kind == "yarn" else 1.0)


def _yarn(rope: Rope, pairs: int, scaling: Mapping[str, Any]) -> list[float]:
    """The share of its own frequency that each pair keeps (transformers `_compute_yarn_parameters`)."""
    dim, original = 2 * pairs, scaling["original_max_position_embeddings"]

    def turning(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turning(scaling.get("beta_fast") or 32), turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return [1 - min(max((pair - low) / width, 0.0), 1.0) for pair in range(pairs)]


def _yarn_attention(scaling: Mapping[str, Any]) -> float:
    def mscale(times: float) -> float:
        return 0.1 * times * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def _llama3(rope: Rope, pairs: int, scaling: Mapping[str, Any]) -> list[float]:
    """The share of its own frequency that each pair keeps (transformers `_compute_llama3_parameters`)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = [2 * math.pi * rope.theta ** (pair / pairs) for pair in range(pairs)]
    shares = [(scaling["original_max_position_embeddings"] / wave - low) / (high - low) for wave in waves]
    return [min(max(share, 0.0), 1.0) for share in shares]


def partial_as_whole(rope: Rope, head_dim: int, positions: int, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rope scaling with which a family that rotates whole heads rotates the first part of them alone.

    longrope divides each pair's frequency by a factor of its own: 1 for the pairs that rotate (the base is raised so
    that theirs come out, `whole_theta`), 1e30 for the others. `scaling` is the source's own, or none. The attention factor
    is on all rows then: `join` takes it off those that do not rotate.
    """
    still = [STILL] * pair_sizes(rope, head_dim)[REST]
    own = frequencies(rope, head_dim, scaling)
    return {
        "rope_type": "longrope",
        "short_factor": [*own.short, *still],
        "long_factor": [*own.long, *still],
        "attention_factor": own.attention,
        "factor": 1.0,
        "original_max_position_embeddings": own.original or positions,
    }


def whole_theta(rope: Rope) -> float:
    """The base whose frequencies over a whole head begin with those of `rope` over its part."""
    return float(rope.theta ** (1.0 / rope.fraction))
