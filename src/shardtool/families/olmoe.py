"""OLMoE: Llama's attention with query and key norms over all heads at once, an expert layer everywhere.

megatron-core has norms per head only: the weights convert, the function is another one (families.exactness).
"""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, MixtureOfExperts
from shardtool.families.blocks import standard as rules
from shardtool.families.dialects import QWEN
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    moe = MixtureOfExperts(
        num_experts=config.get("num_experts", 64),
        top_k=config.get("num_experts_per_tok", 8),
        ffn_size=values["ffn_size"],
        layers=tuple(range(values["num_layers"])),
        pre_softmax=not config.get("norm_topk_prob", False),
    )
    found = standard.derived()(config, values)
    return found | {"moe": moe, "qk_norm_whole": values["num_heads"] > 1}  # of one head it is the same


def _extra(a: Architecture) -> dict[str, Any]:
    moe = a.moe
    assert moe is not None
    return standard.extra(a) | {
        "intermediate_size": moe.ffn_size, "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": not moe.pre_softmax, "attention_bias": False, "clip_qkv": None,
    }  # fmt: skip


def _refuse(config: Config) -> str | None:
    if config.get("clip_qkv") is not None:
        return "clip_qkv: queries, keys and values are clipped, megatron-core does not"
    if config.get("attention_bias"):
        return "attention_bias puts biases on q, k, v and o but not on the MLP; megatron-core cannot"
    if config.get("num_experts_per_tok") == 1 and config.get("norm_topk_prob"):
        return "one expert per token with norm_topk_prob: its weight would always be 1; megatron-core refuses it"
    return rope_refusal(config)


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    standard.table(
        vocab_size=50304, hidden_size=2048, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=16,
        max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    rules,
    fixed={"norm": "rms", "gated": True, "qk_norm": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    dialects=QWEN,
)  # fmt: skip
