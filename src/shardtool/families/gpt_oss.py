"""gpt-oss: experts with biases and a clamped quick GEGLU, attention sinks, a sliding window on every other layer.

Experts are one tensor of all of them, [expert, in, out], gate and up alternating in their columns; published files have
them in MXFP4 (checkpoint.quantised).
"""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, MixtureOfExperts
from shardtool.families.blocks import (
    EXPERT_FC1,
    EXPERT_FC1_BIAS,
    EXPERT_FC2,
    EXPERT_FC2_BIAS,
    HIDDEN,
    MOE_NORM,
    ROUTER,
    ROUTER_LINEAR_BIAS,
    Row,
)
from shardtool.families.blocks import standard as standard_rules
from shardtool.families.family import Config, Family
from shardtool.families.rope import read_rope, rope_refusal
from shardtool.layout.rules import Rule

# fmt: off
EXPERTS: list[Row] = [
    ("post_attention_layernorm.weight", HIDDEN,                              MOE_NORM + ".weight", None),
    ("mlp.router.weight",               "e h -> e h",                        ROUTER,               None),
    ("mlp.router.bias",                 "e -> e",                            ROUTER_LINEAR_BIAS,   None),
    ("mlp.experts.gate_up_proj",        "e h (x (1 + 1)) -> e (x + x) h",    EXPERT_FC1,           "x"),
    ("mlp.experts.gate_up_proj_bias",   "e (x (1 + 1)) -> e (x + x)",        EXPERT_FC1_BIAS,      "x"),
    ("mlp.experts.down_proj",           "e x h -> e h x",                    EXPERT_FC2,           "x"),
    ("mlp.experts.down_proj_bias",      "e h -> e h",                        EXPERT_FC2_BIAS,      None),
]
# fmt: on

YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
ALPHA, LIMIT = 1.702, 7.0  # of the experts' activation; the first is quick GELU's own


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return standard_rules(a, EXPERTS)


def _with_rope(config: Config) -> Config:
    """The config with the class's own rope where it has none."""
    return config if config.get("rope_scaling") or config.get("rope_parameters") else {**config, "rope_scaling": YARN}


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    count, window = values["num_layers"], config.get("sliding_window", 128)
    types = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(count)
    ]
    sliding = tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")
    some = window is not None and sliding
    moe = MixtureOfExperts(
        num_experts=config.get("num_local_experts", config.get("num_experts", 128)),
        top_k=config.get("num_experts_per_tok", 4),
        ffn_size=values["ffn_size"],
        layers=tuple(range(count)),
    )
    limit = config.get("swiglu_limit")
    return {
        "num_query_groups": config.get("num_key_value_heads", 8) or values["num_heads"],
        "head_dim": config.get("head_dim", 64) or values["hidden_size"] // values["num_heads"],
        "rope": read_rope(_with_rope(config), theta=150000.0),
        "window": window if some else None,
        "window_layers": sliding if some and len(sliding) < count else None,
        "clamp": LIMIT if limit is None else float(limit),
        "moe": moe,
    }


def _extra(a: Architecture) -> dict[str, Any]:
    moe = a.moe
    assert moe is not None
    sliding = range(a.num_layers) if a.window_layers is None else a.window_layers
    kinds = [a.window is not None and layer in sliding for layer in range(a.num_layers)]
    found = standard.extra(a) | {
        "hidden_act": "silu", "attention_bias": a.linear_bias, "sliding_window": a.window,
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in kinds],
        "intermediate_size": moe.ffn_size, "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "swiglu_alpha": ALPHA, "swiglu_limit": a.clamp,
    }  # fmt: skip
    # without any, the class would take its own
    return found if found["rope_scaling"] else found | {"rope_scaling": {"rope_type": "default"}}


def _refuse(config: Config) -> str | None:
    if not config.get("attention_bias", True):
        return "attention_bias is off: megatron-core has biases on all linears of a layer, or on qkv alone"
    if config.get("swiglu_alpha", ALPHA) != ALPHA:
        return f"swiglu_alpha {config['swiglu_alpha']}: megatron-core's quick GELU has {ALPHA}"
    if unknown := set(config.get("layer_types") or ()) - {"sliding_attention", "full_attention"}:
        return f"layer_types: {', '.join(sorted(unknown))} is not known"
    return rope_refusal(_with_rope(config))


FAMILY = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    tuple(
        field
        for field in standard.table(
            vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36, num_attention_heads=64,
            max_position_embeddings=131072, rms_norm_eps=1e-5,
        )
        if field.name != "activation"
    ),
    _rules,
    fixed={
        "norm": "rms", "gated": True, "activation": "quick_gelu", "glu_offset": 1.0, "linear_bias": True, "sinks": True
    },
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
)  # fmt: skip
