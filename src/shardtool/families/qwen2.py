"""Qwen2 and Qwen2.5 (R1-distill-Qwen, QwQ): Llama's keys with a bias on q, k and v alone."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import standard as rules
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(groups=32)(config, values) | standard.windows(config)


def _extra(a: Architecture) -> dict[str, Any]:
    return standard.extra(a) | standard.window_keys(a)


def _refuse(config: Config) -> str | None:
    return standard.window_refusal(config) or rope_refusal(config)


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    standard.table(intermediate_size=22016, vocab_size=151936, max_position_embeddings=32768),
    rules,
    fixed={"norm": "rms", "gated": True, "qkv_bias": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
)
