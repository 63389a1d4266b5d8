"""DeepSeek-V3 and R1, Moonlight, Kimi-K2 (latent attention); GLM-4.5 and dots1 (grouped-query attention).

What they share: sigmoid routing with a correction bias, a shared expert of n x the expert size, dense first layers,
multi-token-prediction layers numbered on after the last layer.
"""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, LatentAttention, MixtureOfExperts
from shardtool.families.blocks import standard as rules
from shardtool.families.dialects import QWEN
from shardtool.families.exactness import group_score
from shardtool.families.family import Config, Family
from shardtool.families.rope import read_rope, rope_refusal, write_rope


def _moe(config: Config, values: dict[str, Any], defaults: Config) -> MixtureOfExperts:
    def get(key: str) -> Any:
        value = config.get(key)
        return defaults.get(key) if value is None else value

    groups, scaling = get("n_group") or 1, get("routed_scaling_factor")
    return MixtureOfExperts(
        num_experts=get("n_routed_experts"),
        top_k=get("num_experts_per_tok"),
        ffn_size=get("moe_intermediate_size"),
        layers=tuple(range(get("first_k_dense_replace"), values["num_layers"])),
        score="sigmoid",
        scaling=None if scaling in (None, 1.0) else float(scaling),
        expert_bias=True,
        groups=groups if groups > 1 else None,
        group_top_k=get("topk_group") if groups > 1 else None,
        group_score=group_score(get("num_experts_per_tok"), groups if groups > 1 else None, get("topk_group"), 2),
        shared_ffn_size=get("moe_intermediate_size") * (get("n_shared_experts") or 0),
    )


def _moe_keys(a: Architecture) -> dict[str, Any]:
    moe = a.moe
    assert moe is not None
    return {
        "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.ffn_size,
        "n_shared_experts": moe.shared_ffn_size // moe.ffn_size, "first_k_dense_replace": a.num_layers - len(moe.layers),
        "routed_scaling_factor": moe.scaling or 1.0, "n_group": moe.groups or 1, "topk_group": moe.group_top_k or 1,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
        "num_nextn_predict_layers": a.mtp_layers,
    }  # fmt: skip


def _refuse_routing(config: Config) -> str | None:
    if not config.get("norm_topk_prob", True) and config.get("num_experts_per_tok", 8) > 1:
        return "norm_topk_prob is off: megatron-core always renormalises sigmoid scores"
    if config.get("moe_layer_freq", 1) != 1:
        return "moe_layer_freq: this family's experts are on every layer after the first dense ones"
    return None


# --- DeepSeek-V3 -----------------------------------------------------------------------------------------------------

V3_DEFAULTS = {
    "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
    "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
}  # fmt: skip


def _latent(config: Config) -> LatentAttention:
    return LatentAttention(
        query_rank=config.get("q_lora_rank", 1536),
        key_value_rank=config.get("kv_lora_rank", 512),
        nope_dim=config.get("qk_nope_head_dim", 128),
        rope_dim=config.get("qk_rope_head_dim", 64),
        value_dim=config.get("v_head_dim", 128),
    )


def latent_keys(a: Architecture) -> dict[str, Any]:
    """The keys of config.json for latent attention and its rope."""
    mla = a.mla
    assert mla is not None
    return {
        "q_lora_rank": mla.query_rank, "kv_lora_rank": mla.key_value_rank, "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim, "v_head_dim": mla.value_dim, "num_key_value_heads": a.num_heads,
        "attention_bias": False, **write_rope(a.rope),
    }  # fmt: skip


def latent_fields(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of an Architecture that latent attention decides."""
    return {
        "mla": _latent(config),
        "num_query_groups": values["num_heads"],
        "head_dim": values["hidden_size"] // values["num_heads"],
        "rope": read_rope(config, latent=True),
        "mtp_layers": config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 0)) or 0,
    }


def _derived_v3(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return latent_fields(config, values) | {"moe": _moe(config, values, V3_DEFAULTS)}


def _refuse_v3(config: Config) -> str | None:
    if config.get("attention_bias"):
        return "attention_bias: megatron-core's latent attention has no biases"
    if not config.get("rope_interleave", True):
        return "rope_interleave is off: megatron-core's latent attention pairs neighbouring dims"
    if config.get("scoring_func", "sigmoid") != "sigmoid" or config.get("topk_method", "noaux_tc") != "noaux_tc":
        return f"routing by {config.get('scoring_func')} and {config.get('topk_method')}"
    return _refuse_routing(config) or rope_refusal(config, latent=True)


def latent_eps(a: Architecture) -> tuple[str, ...]:
    """transformers fixes the eps of the latent norms to 1e-6; megatron-core has one eps for all norms."""
    if a.norm_eps == 1e-6:
        return ()
    return (
        f"the latent norms have eps 1e-6 in transformers and {a.norm_eps} in megatron-core: logits differ by about 5e-5",
    )


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    standard.table(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
        max_position_embeddings=4096,
    ),
    rules,
    fixed={"norm": "rms", "gated": True, "qk_norm": True},
    derived=_derived_v3,
    extra=lambda a: latent_keys(a) | _moe_keys(a) | {"rope_interleave": True},
    refuse=_refuse_v3,
    ignored=(*standard.ROTARY_BUFFERS, r"model\.layers\.\d+\.self_attn\.rotary_emb\..*"),
    caveats=latent_eps,
    dialects=QWEN,
)  # fmt: skip


# --- GLM-4.5 ---------------------------------------------------------------------------------------------------------

GLM_DEFAULTS = {
    "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def _derived_glm(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(groups=8, fraction=0.5)(config, values) | {
        "moe": _moe(config, values, GLM_DEFAULTS),
        "qkv_bias": bool(config.get("attention_bias")),
        "qk_norm": bool(config.get("use_qk_norm")),
        "mtp_layers": config.get("num_nextn_predict_layers", 0) or 0,
    }


def _extra_glm(a: Architecture) -> dict[str, Any]:
    return standard.extra(a) | _moe_keys(a) | {"attention_bias": a.qkv_bias, "use_qk_norm": a.qk_norm}


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    standard.table(
        vocab_size=151552, hidden_size=4096, intermediate_size=10944, num_hidden_layers=46, num_attention_heads=96,
        max_position_embeddings=131072, rms_norm_eps=1e-5,
    ),
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived_glm,
    extra=_extra_glm,
    refuse=lambda config: _refuse_routing(config) or rope_refusal(config, partial=True),
    ignored=standard.ROTARY_BUFFERS,
    dialects=QWEN,
)  # fmt: skip


# --- dots1 -----------------------------------------------------------------------------------------------------------

DOTS_DEFAULTS = {
    "n_routed_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": 1408, "n_shared_experts": None,
    "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def _derived_dots(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived()(config, values) | standard.windows(_windowed(config)) | {
        "moe": _moe(config, values, DOTS_DEFAULTS),
    }  # fmt: skip


def _windowed(config: Config) -> Config:
    """The config as Qwen2 would have it: here windows are on wherever sliding_window is a number."""
    found = {"max_window_layers": 62, "sliding_window": 4096, **config}
    return found | {"use_sliding_window": found["sliding_window"] is not None}


def _extra_dots(a: Architecture) -> dict[str, Any]:
    keys = standard.window_keys(a) if a.window is not None else {"sliding_window": None}
    return standard.extra(a) | _moe_keys(a) | {"attention_bias": False} | keys


def _refuse_dots(config: Config) -> str | None:
    if config.get("attention_bias"):
        return "attention_bias puts biases on q, k, v and o but not on the MLP; megatron-core cannot"
    if "norm_topk_prob" not in config:
        return "norm_topk_prob is off: megatron-core always renormalises sigmoid scores"
    return standard.window_refusal(_windowed(config)) or _refuse_routing(config) or rope_refusal(config)


DOTS1 = Family(
    "dots1",
    "Dots1ForCausalLM",
    standard.table(
        vocab_size=152064, hidden_size=4608, intermediate_size=10944, num_hidden_layers=62, max_position_embeddings=2048
    ),
    rules,
    fixed={"norm": "rms", "gated": True, "qk_norm": True},
    derived=_derived_dots,
    extra=_extra_dots,
    refuse=_refuse_dots,
    ignored=standard.ROTARY_BUFFERS,
    dialects=QWEN,
)
