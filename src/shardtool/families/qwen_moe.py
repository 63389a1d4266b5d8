"""Qwen2-MoE (QKV bias, a shared expert behind a gate) and Qwen3-MoE (qk-norm): softmax over all experts, then the top k,
renormalised where `norm_topk_prob` says so."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, MixtureOfExperts
from shardtool.families.blocks import experts
from shardtool.families.blocks import standard as standard_rules
from shardtool.families.dialects import QWEN
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return standard_rules(a, experts(a, shared="mlp.shared_expert.") if a.moe else None)


def _moe(config: Config, count: int, ffn_size: int, num_layers: int) -> MixtureOfExperts:
    dense, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step", 1)
    return MixtureOfExperts(
        num_experts=config.get("num_experts", config.get("num_local_experts", count)),
        top_k=config.get("num_experts_per_tok", 4),
        ffn_size=config.get("moe_intermediate_size", ffn_size),
        layers=tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0),
        pre_softmax=not config.get("norm_topk_prob", False),
    )


def _derived2(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    moe = _moe(config, 60, 1408, values["num_layers"])
    shared = config.get("shared_expert_intermediate_size", 5632)
    return standard.derived(groups=16)(config, values) | {
        "moe": _with_shared(moe, shared), "qkv_bias": config.get("qkv_bias", True),
    }  # fmt: skip


def _with_shared(moe: MixtureOfExperts, size: int) -> MixtureOfExperts:
    return MixtureOfExperts(
        moe.num_experts,
        moe.top_k,
        moe.ffn_size,
        moe.layers,
        pre_softmax=moe.pre_softmax,
        shared_ffn_size=size,
        shared_gate=True,
    )


def _derived3(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    found = standard.derived(groups=4)(config, values)
    return found | {"moe": _moe(config, 128, 768, values["num_layers"])}


def _extra(a: Architecture) -> dict[str, Any]:
    moe = a.moe
    assert moe is not None
    return standard.extra(a) | {
        "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.ffn_size,
        "norm_topk_prob": not moe.pre_softmax, "decoder_sparse_step": 1, "use_sliding_window": False,
        "mlp_only_layers": [layer for layer in range(a.num_layers) if layer not in moe.layers],
    }  # fmt: skip


def _extra2(a: Architecture) -> dict[str, Any]:
    shared = a.moe.shared_ffn_size if a.moe else 0
    return _extra(a) | {"shared_expert_intermediate_size": shared, "qkv_bias": a.qkv_bias}


def _refuse(config: Config) -> str | None:
    if config.get("use_sliding_window"):
        return "use_sliding_window: some layers have a sliding window and others not"
    if config.get("attention_bias"):
        return "attention_bias puts biases on q, k, v and o but not on the MLP; megatron-core cannot"
    if config.get("num_experts_per_tok") == 1 and config.get("norm_topk_prob"):
        return "one expert per token with norm_topk_prob: its weight would always be 1; megatron-core refuses it"
    return rope_refusal(config)


QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    standard.table(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=5632, vocab_size=151936,
        max_position_embeddings=32768,
    ),
    _rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived2,
    extra=_extra2,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    dialects=QWEN,
)  # fmt: skip

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    standard.table(
        hidden_size=2048, num_hidden_layers=24, intermediate_size=6144, vocab_size=151936, max_position_embeddings=32768
    ),
    _rules,
    fixed={"norm": "rms", "gated": True, "qk_norm": True},
    derived=_derived3,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    dialects=QWEN,
)
