"""Qwen3 dense: Llama's keys, a norm on each query and key head before rope, a head dim of its own, no biases."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import standard as rules
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(head_dim=128, groups=32)(config, values) | standard.windows(config)


def _extra(a: Architecture) -> dict[str, Any]:
    return standard.extra(a) | standard.window_keys(a)


def _refuse(config: Config) -> str | None:
    if config.get("attention_bias"):
        return "attention_bias puts biases on q, k, v and o but not on the MLP; megatron-core cannot"
    return standard.window_refusal(config) or rope_refusal(config)


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    standard.table(intermediate_size=22016, vocab_size=151936, max_position_embeddings=32768),
    rules,
    fixed={"norm": "rms", "gated": True, "qk_norm": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
)
