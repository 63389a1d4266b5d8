"""Mistral 7B and Nemo: Llama's keys, a sliding window on every layer (7B v0.1), a head dim of its own (Nemo)."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import standard as rules
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(groups=8)(config, values) | {"window": config.get("sliding_window", 4096)}


def _extra(a: Architecture) -> dict[str, Any]:
    return standard.extra(a) | {"sliding_window": a.window}


def _refuse(config: Config) -> str | None:
    if config.get("layer_types"):
        return "layer_types: attention that changes from layer to layer is another architecture (ministral)"
    return rope_refusal(config)


FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    standard.table(intermediate_size=14336, max_position_embeddings=131072),
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
)
