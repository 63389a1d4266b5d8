"""OLMo 1: Llama whose LayerNorms have neither weight nor bias. megatron-core's norms have weights, so it is translated only."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import attention, embedding, layers, mlp
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule

NORM_EPS = 1e-5  # transformers 5 modeling_olmo.py: OlmoLayerNorm has no other


def _rules(a: Architecture) -> tuple[Rule, ...]:
    rows = [row for row in attention(a) + mlp(a) if "layernorm" not in row[0]]
    return (
        *embedding("model.embed_tokens.weight", "lm_head.weight", tied=a.tied),
        *layers("model.layers.{l}.", rows),
    )


def _extra(a: Architecture) -> dict[str, Any]:
    return {key: value for key, value in standard.extra(a).items() if key != "head_dim"} | {
        "attention_bias": False, "clip_qkv": None,
    }  # fmt: skip


def _refuse(config: Config) -> str | None:
    if config.get("clip_qkv") is not None:
        return "clip_qkv: queries, keys and values are cut to a range, which depends on the data"
    if config.get("attention_bias"):
        return "attention_bias is not known in this family"
    return rope_refusal(config)


FAMILY = Family(
    "olmo",
    "OlmoForCausalLM",
    tuple(
        field for field in standard.table(vocab_size=50304, max_position_embeddings=2048) if field.name != "norm_eps"
    ),
    _rules,
    fixed={"norm": "layer", "norm_eps": NORM_EPS, "norm_weights": False, "gated": True},
    derived=lambda config, values: standard.derived()({**config, "head_dim": None}, values),
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    not_in_megatron=lambda _: "its norms have no weights, megatron-core's have",
)
