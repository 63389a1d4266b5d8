"""Mixtral: Mistral's attention, every layer with experts w1 (gate), w3 (up), w2 (down), softmax over the top k."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, MixtureOfExperts
from shardtool.families.blocks import experts
from shardtool.families.blocks import standard as standard_rules
from shardtool.families.dialects import MIXTRAL
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule


def _rules(a: Architecture) -> tuple[Rule, ...]:
    at = "block_sparse_moe."
    return standard_rules(a, experts(a, at + "gate", at + "experts.{e}.", ("w1", "w3", "w2")))


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    moe = MixtureOfExperts(
        num_experts=config.get("num_local_experts", 8),
        top_k=config.get("num_experts_per_tok", 2),
        ffn_size=values["ffn_size"],
        layers=tuple(range(values["num_layers"])),
    )
    return standard.derived(groups=8, theta=1e6)(config, values) | {"window": config.get("sliding_window"), "moe": moe}


def _extra(a: Architecture) -> dict[str, Any]:
    moe = a.moe
    assert moe is not None
    return standard.extra(a) | {
        "sliding_window": a.window, "intermediate_size": moe.ffn_size,
        "num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
    }  # fmt: skip


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    standard.table(intermediate_size=14336, max_position_embeddings=131072, rms_norm_eps=1e-5),
    _rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=_extra,
    refuse=rope_refusal,
    ignored=standard.ROTARY_BUFFERS,
    dialects=MIXTRAL,
)
