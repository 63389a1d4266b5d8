"""The rotary embedding in config.json, in both of its dialects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardtool.families.architecture import Rope, RopeScaling

# megatron-core 0.16.1: rope_scaling=True fixes these, only the factor is a parameter (rotary_pos_embedding.py)
LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


def read_rope(
    config: Mapping[str, Any],
    *,
    theta: float = 10000.0,
    latent: bool = False,
    fraction: float | None = None,
    interleaved: bool = False,
) -> Rope:
    """The rotary embedding of a config.json: rope_theta + rope_scaling, or rope_parameters.

    `theta` is what the configuration class takes where none is given; `latent` says that attention is latent, which has
    code of its own for yarn; `fraction` is the default share of each head that is rotated, for families where it may be
    less than all; `interleaved` says that neighbouring dims are a pair. Raises ValueError for a kind that megatron-core's
    GPTModel cannot express.
    """
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    part = float(scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or fraction or 1.0))
    if part != 1.0 and fraction is None:
        raise ValueError(f"partial_rotary_factor {part}: this family's attention rotates whole heads")
    if kind == "yarn" and not latent and (interleaved or part != 1.0):  # yarn_rotary_pos_embedding.py 0.16.1
        what = "neighbouring dims" if interleaved else "a part of each head"
        raise ValueError(f"yarn on {what}: megatron-core's yarn rotates whole heads and pairs their halves")
    return Rope(base, part, interleaved, _scaling(kind, scaling, latent))


def _scaling(kind: str, scaling: Mapping[str, Any], latent: bool) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(scaling["factor"]))
    if kind == "llama3":
        found = {name: float(scaling[name]) for name in LLAMA3_CONSTANTS}
        if found != LLAMA3_CONSTANTS:
            raise ValueError(
                f"llama3 rope scaling with constants {tuple(found.values())}: megatron-core fixes them to (1, 4, 8192)"
            )
        return RopeScaling("llama3", float(scaling["factor"]))
    if kind == "yarn":
        return _read_yarn(scaling, latent)
    raise ValueError(f"rope type {kind!r}: megatron-core's GPTModel has default, linear, llama3 and yarn")


def _read_yarn(scaling: Mapping[str, Any], latent: bool) -> RopeScaling:
    if scaling.get("attention_factor") is not None:
        raise ValueError("yarn with an attention_factor of its own: megatron-core computes it")
    if latent and not scaling.get("truncate", True):
        raise ValueError("yarn without truncate: megatron-core's latent attention always rounds its correction range")
    mscale_all = float(scaling.get("mscale_all_dim") or 0.0)
    return RopeScaling(
        "yarn",
        float(scaling["factor"]),
        original_max_positions=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        # transformers uses mscale only where both are given (modeling_rope_utils.py 5.23)
        mscale=float(scaling.get("mscale") or 1.0) if latent or mscale_all else 1.0,
        mscale_all_dim=mscale_all,
        truncate=bool(scaling.get("truncate", True)),
    )


def write_rope(rope: Rope | None) -> dict[str, Any]:
    """The keys of config.json for a rotary embedding, in the dialect that transformers 4 and 5 both read."""
    if rope is None:
        return {}
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        keys["partial_rotary_factor"] = rope.fraction
    if rope.scaling is None:
        return keys | {"rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling.kind, "factor": rope.scaling.factor}
    if rope.scaling.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_max_positions,
        }
    if rope.scaling.kind == "yarn":
        names = {"original_max_position_embeddings": "original_max_positions"}
        names |= {name: name for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}
        scaling |= {key: getattr(rope.scaling, name) for key, name in names.items()}
    return keys | {"rope_scaling": scaling}


def rope_refusal(
    config: Mapping[str, Any], *, latent: bool = False, partial: bool = False, interleaved: bool = False
) -> str | None:
    """Why the rotary embedding of a config.json cannot be converted, or None."""
    try:
        read_rope(config, latent=latent, fraction=1.0 if partial else None, interleaved=interleaved)
    except (ValueError, KeyError) as error:
        return f"incomplete rope scaling, {error} is missing" if isinstance(error, KeyError) else str(error)
    return None
