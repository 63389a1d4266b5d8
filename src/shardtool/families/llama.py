"""Llama 1, 2 and 3.x, and what is the same on disk: Yi, DeepSeek-LLM, R1-distill-Llama, Vicuna, SmolLM2."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import standard as rules
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    attention, everywhere = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    partly = attention and not everywhere
    return standard.derived()(config, values) | {"linear_bias": everywhere, "qkv_bias": partly, "out_bias": partly}


def _extra(a: Architecture) -> dict[str, Any]:
    return standard.extra(a) | {
        "attention_bias": a.linear_bias or a.qkv_bias or a.out_bias, "mlp_bias": a.linear_bias,
    }  # fmt: skip


def _refuse(config: Config) -> str | None:
    if config.get("mlp_bias") and not config.get("attention_bias"):
        return "attention_bias and mlp_bias differ; megatron-core has biases on all linears, or on qkv alone"
    return rope_refusal(config)


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    standard.table(),
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
)
