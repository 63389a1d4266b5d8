"""Phi-3 and Phi-4: Llama with q, k, v stacked in one tensor and gate and up in another; Phi-4-mini rotates a part of
each head."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import (
    DOWN,
    FC1,
    FC2,
    FINAL_NORM,
    HIDDEN,
    INPUT_NORM,
    LINEAR_OUT,
    LINEAR_QKV,
    MLP_NORM,
    OUT,
    STACKED_GLU,
    STACKED_QKV,
    Row,
    embedding,
    layers,
)  # fmt: skip
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule, rule

# fmt: off
LAYER: list[Row] = [
    ("input_layernorm.weight",          HIDDEN,      INPUT_NORM + "_weight", None),
    ("self_attn.qkv_proj.weight",       STACKED_QKV, LINEAR_QKV + ".weight", "g"),
    ("self_attn.o_proj.weight",         OUT,         LINEAR_OUT + ".weight", "g"),
    ("post_attention_layernorm.weight", HIDDEN,      MLP_NORM + "_weight",   None),
    ("mlp.gate_up_proj.weight",         STACKED_GLU, FC1 + ".weight",        "f"),
    ("mlp.down_proj.weight",            DOWN,        FC2 + ".weight",        "f"),
]
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("model.embed_tokens.weight", "lm_head.weight", tied=a.tied),
        *layers("model.layers.{l}.", LAYER),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    )


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(fraction=1.0)(config, values) | {"window": config.get("sliding_window")}


def _extra(a: Architecture) -> dict[str, Any]:
    return standard.extra(a) | {"sliding_window": a.window, "original_max_position_embeddings": a.max_positions}


FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    standard.table(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, rms_norm_eps=1e-5
    ),
    _rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=_extra,
    refuse=lambda config: rope_refusal(config, partial=True),
    ignored=standard.ROTARY_BUFFERS,
)
