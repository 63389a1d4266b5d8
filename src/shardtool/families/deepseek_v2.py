"""DeepSeek-V2 and V2-Lite: latent attention, softmax routing without a bias, no multi-token prediction."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, MixtureOfExperts
from shardtool.families.blocks import standard as rules
from shardtool.families.deepseek_v3 import latent_eps, latent_fields, latent_keys
from shardtool.families.dialects import QWEN
from shardtool.families.exactness import group_score
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    scaling, size = config.get("routed_scaling_factor", 1.0), config.get("moe_intermediate_size", 1407)
    groups = config.get("n_group") if config.get("topk_method", "greedy") == "group_limited_greedy" else None
    moe = MixtureOfExperts(
        num_experts=config.get("n_routed_experts", 64),
        top_k=config.get("num_experts_per_tok") or 0,
        ffn_size=size,
        layers=tuple(range(config.get("first_k_dense_replace", 0), values["num_layers"])),
        pre_softmax=True,  # this class never renormalises, whatever norm_topk_prob says
        scaling=None if scaling == 1.0 else float(scaling),
        groups=groups if groups and groups > 1 else None,
        group_top_k=config.get("topk_group") if groups and groups > 1 else None,
        group_score=group_score(
            config.get("num_experts_per_tok") or 0,
            groups if groups and groups > 1 else None,
            config.get("topk_group"),
            1,
        ),
        shared_ffn_size=size * (config.get("n_shared_experts", 2) or 0),
    )
    return latent_fields(config, values) | {"moe": moe, "mtp_layers": 0}


def _extra(a: Architecture) -> dict[str, Any]:
    moe = a.moe
    assert moe is not None
    return latent_keys(a) | {
        "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.ffn_size,
        "n_shared_experts": moe.shared_ffn_size // moe.ffn_size, "first_k_dense_replace": a.num_layers - len(moe.layers),
        "routed_scaling_factor": moe.scaling or 1.0, "n_group": moe.groups or 1, "topk_group": moe.group_top_k or 1,
        "topk_method": "group_limited_greedy" if moe.groups else "greedy", "norm_topk_prob": False,
        "scoring_func": "softmax",
    }  # fmt: skip


def _refuse(config: Config) -> str | None:
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "attention_bias or mlp_bias: megatron-core's latent attention has no biases"
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        return f"topk_method {method!r}: greedy and group_limited_greedy are known"
    return rope_refusal(config, latent=True)


FAMILY = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    standard.table(vocab_size=102400, hidden_size=4096, max_position_embeddings=2048),
    rules,
    fixed={"norm": "rms", "gated": True, "qk_norm": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=(*standard.ROTARY_BUFFERS, r"model\.layers\.\d+\.self_attn\.rotary_emb\..*"),
    caveats=latent_eps,
    dialects=QWEN,
)
