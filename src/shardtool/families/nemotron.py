"""Nemotron-4 and Minitron: LayerNorm with gamma stored as gamma - 1, squared ReLU, rope on half of each head."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import standard as standard_rules
from shardtool.families.blocks import stored_centred
from shardtool.families.family import Config, Family, Field
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return stored_centred(standard_rules(a))


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(fraction=0.5)(config, values) | {"linear_bias": bool(config.get("attention_bias"))}


def _extra(a: Architecture) -> dict[str, Any]:
    # a fraction of 1 is not the class's default, so it is always said
    fraction = {"partial_rotary_factor": a.rope.fraction} if a.rope else {}
    return standard.extra(a) | fraction | {"attention_bias": a.linear_bias, "mlp_bias": a.linear_bias}


def _refuse(config: Config) -> str | None:
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        return "attention_bias and mlp_bias differ; megatron-core has biases on all linears, or on qkv alone"
    return rope_refusal(config, partial=True)


FAMILY = Family(
    "nemotron",
    "NemotronForCausalLM",
    (
        *(
            field
            for field in standard.table(
                vocab_size=256000, hidden_size=6144, intermediate_size=24576, num_attention_heads=48,
                max_position_embeddings=4096, hidden_act="relu2",
            )
            if field.name != "norm_eps"
        ),
        Field("norm_eps", "norm_eps", 1e-5, float),
    ),
    _rules,
    fixed={"norm": "layer", "gated": False, "centred_norms": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
)  # fmt: skip
