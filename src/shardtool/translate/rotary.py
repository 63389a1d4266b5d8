"""Rotary embedding between families: the order of a head's rows, and frequencies that a config.json can say.

Reference: transformers `modeling_rope_utils.py`, the same from 4.43 to 5.23 in what is used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shardtool.families.architecture import Rope
from shardtool.families.family import Config, Family
from shardtool.layout.equation import Product, Sum

HALF, PAIR, REST = "half", "pair", "rest"  # the two of a pair, the pairs that are rotated, those that are not
STILL = 1e30  # a frequency divided by this does not rotate: position / 1e30 is 0 in fp32
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


def partial_as_whole(rope: Rope, head_dim: int, positions: int, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rope scaling with which a family that rotates whole heads rotates the first part of them alone.

    longrope divides each pair's frequency by a factor of its own: 1 for the pairs that rotate (the base is raised so
    that theirs come out, `whole_theta`), 1e30 for the others. `scaling` is the source's own, longrope or none.
    """
    sizes = pair_sizes(rope, head_dim)
    still = [STILL] * sizes[REST]
    plain = [1.0] * sizes[PAIR]
    own = scaling or {"short_factor": plain, "long_factor": plain, "original_max_position_embeddings": positions}
    return {
        "rope_type": "longrope",
        "short_factor": [*own["short_factor"], *still],
        "long_factor": [*own["long_factor"], *still],
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": own["original_max_position_embeddings"],
    }


def whole_theta(rope: Rope) -> float:
    """The base whose frequencies over a whole head begin with those of `rope` over its part."""
    return float(rope.theta ** (1.0 / rope.fraction))
