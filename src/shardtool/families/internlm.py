"""InternLM 1 (remote code): Llama with a bias on q, k, v and o, and none in the MLP: megatron-core has none on o."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, Rope
from shardtool.families.blocks import standard as rules
from shardtool.families.family import Config, Family

DYNAMIC = "dynamic"


def _rotary(config: Config) -> dict[str, Any]:
    return {"base": 10000, "type": DYNAMIC, **(config.get("rotary") or {})}


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("bias", True))
    return {
        "num_query_groups": values["num_heads"],
        "head_dim": values["hidden_size"] // values["num_heads"],
        "rope": Rope(float(_rotary(config)["base"])),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _extra(a: Architecture) -> dict[str, Any]:
    base = a.rope.theta if a.rope else 10000.0
    return {"bias": a.qkv_bias or a.out_bias, "rotary": {"base": base, "type": "origin"}}


def _limit(config: Config) -> str | None:
    dynamic = _rotary(config)["type"] == DYNAMIC
    return "dynamic NTK sets in beyond max_position_embeddings" if dynamic else None


FAMILY = Family(
    "internlm",
    "InternLMForCausalLM",
    standard.table(vocab_size=103168, max_position_embeddings=2048),
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=_extra,
    refuse=lambda _: None,
    ignored=standard.ROTARY_BUFFERS,
    own_rope=True,
    limit=_limit,
)
