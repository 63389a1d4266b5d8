"""GLM-4-9B (`glm`, GLM-Edge): QKV bias, rope on interleaved pairs of the first half of each head, stacked gate and up."""

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
    MLP_NORM,
    STACKED_GLU,
    Row,
    attention,
    embedding,
    layers,
)  # fmt: skip
from shardtool.families.family import Config, Family
from shardtool.families.rope import read_rope, rope_refusal
from shardtool.layout.rules import Rule, rule

# fmt: off
MLP: list[Row] = [
    ("post_attention_layernorm.weight", HIDDEN,      MLP_NORM + "_weight", None),
    ("mlp.gate_up_proj.weight",         STACKED_GLU, FC1 + ".weight",      "f"),
    ("mlp.down_proj.weight",            DOWN,        FC2 + ".weight",      "f"),
]
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("model.embed_tokens.weight", "lm_head.weight", tied=a.tied),
        *layers("model.layers.{l}.", attention(a) + MLP),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    )


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(head_dim=128, groups=2, fraction=0.5)(config, values) | {
        "qkv_bias": bool(config.get("attention_bias", True)),
        "rope": read_rope(config, fraction=0.5, interleaved=True),
    }


FAMILY = Family(
    "glm",
    "GlmForCausalLM",
    standard.table(
        vocab_size=151552, hidden_size=4096, intermediate_size=13696, num_hidden_layers=40,
        max_position_embeddings=131072, rms_norm_eps=1.5625e-7,
    ),
    _rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=lambda a: standard.extra(a) | {
        "attention_bias": a.qkv_bias, "partial_rotary_factor": a.rope.fraction if a.rope else 0.5,
    },
    refuse=lambda config: rope_refusal(config, partial=True, interleaved=True),
    ignored=standard.ROTARY_BUFFERS,
)  # fmt: skip
