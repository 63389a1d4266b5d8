"""Baichuan-7B (remote code): Llama with q, k, v stacked in W_pack. The 13B models use ALiBi, which Megatron has not."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import (
    FINAL_NORM,
    HIDDEN,
    INPUT_NORM,
    LINEAR_OUT,
    LINEAR_QKV,
    OUT,
    STACKED_QKV,
    Row,
    embedding,
    layers,
    mlp,
)  # fmt: skip
from shardtool.families.family import Config, Family
from shardtool.layout.rules import Rule, rule

# fmt: off
ATTENTION: list[Row] = [
    ("input_layernorm.weight",  HIDDEN,      INPUT_NORM + "_weight", None),
    ("self_attn.W_pack.weight", STACKED_QKV, LINEAR_QKV + ".weight", "g"),
    ("self_attn.o_proj.weight", OUT,         LINEAR_OUT + ".weight", "g"),
]
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("model.embed_tokens.weight", "lm_head.weight", tied=a.tied),
        *layers("model.layers.{l}.", ATTENTION + mlp(a)),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    )


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived()({**config, "num_key_value_heads": None, "head_dim": None}, values)


def _refuse(config: Config) -> str | None:
    if "max_position_embeddings" not in config or config.get("num_attention_heads") == 40:
        return "this is a 13B model: it uses ALiBi, and megatron-core has no such positions"
    if config.get("vocab_size") == 125696 or "z_loss_weight" in config:
        return "Baichuan 2 normalises its head in the forward pass (NormHead), which is not converted"
    return None


FAMILY = Family(
    "baichuan",
    "BaichuanForCausalLM",
    standard.table(vocab_size=64000, max_position_embeddings=4096),
    _rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=lambda _: {},
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
)
