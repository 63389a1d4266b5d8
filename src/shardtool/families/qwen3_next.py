"""Qwen3-Next and Qwen3.5 (text): three layers of gated delta net, then one of attention whose output is gated.

Norms are stored as gamma - 1, but for the one inside the delta net. An only multi-token-prediction layer, which
transformers drops, is an attention layer under names of its own.
"""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, LinearAttention, MixtureOfExperts
from shardtool.families.blocks import (
    FINAL_NORM,
    HIDDEN,
    IN_PROJ,
    IN_PROJ_GROUPED,
    MTP_INPUT,
    OUT_NORM,
    Row,
    attention,
    decoder,
    embedding,
    experts,
    layers,
    mlp,
    stored_centred,
)  # fmt: skip
from shardtool.families.dialects import QWEN, Dialect
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule, rule

IN_PROJ_APART: Row = (  # Qwen3.5: all queries, keys and values; the gates; betas; alphas
    (
        "linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight",
        "linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight",
    ),
    "(t a + t a + t r b) h, (t r b) h, (t r) h, (t r) h -> (t a + t a + t r b + t r b + t r + t r) h",
    IN_PROJ + ".weight",
    "t",
)  # fmt: skip

# fmt: off
MTP: list[Row] = [
    ("mtp.pre_fc_norm_embedding.weight", HIDDEN,       "enorm.weight",           None),
    ("mtp.pre_fc_norm_hidden.weight",    HIDDEN,       "hnorm.weight",           None),
    ("mtp.fc.weight",                    MTP_INPUT,    "eh_proj.weight",         "o"),
    ("mtp.norm.weight",                  HIDDEN,       "final_layernorm.weight", None),
]
# fmt: on


# published configs may be silent on the MTP layer: the files decide whether there is one
MTP_KEYS = {"qwen3_next": "num_nextn_predict_layers", "qwen3_5": "mtp_num_hidden_layers"}


def _rules(a: Architecture, in_proj: Row) -> tuple[Rule, ...]:
    rows = experts(a, shared="mlp.shared_expert.") if a.moe else []
    found = (
        *embedding("model.embed_tokens.weight", "lm_head.weight", tied=a.tied),
        *decoder(a, rows, in_proj=in_proj),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    )
    if a.mtp_layers:
        outer = "mtp.layers.{m}."
        found += layers("", MTP, inner=outer)
        found += layers(outer, attention(a) + (rows if a.moe else mlp(a)), inner=outer + "transformer_layer.")
    return stored_centred(found, but=(OUT_NORM,))


def _linear(config: Config, count: int) -> LinearAttention:
    interval = config.get("full_attention_interval") or 4
    types = config.get("layer_types") or [
        "linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(count)
    ]
    return LinearAttention(
        tuple(layer for layer, kind in enumerate(types) if kind == "linear_attention"),
        config.get("linear_num_key_heads", 16),
        config.get("linear_num_value_heads", 32),
        config.get("linear_key_head_dim", 128),
        config.get("linear_value_head_dim", 128),
        config.get("linear_conv_kernel_dim", 4),
    )


def _derived(config: Config, values: dict[str, Any], groups: int) -> dict[str, Any]:
    return standard.derived(head_dim=256, groups=groups, fraction=0.25)(config, values) | {
        "linear": _linear(config, values["num_layers"]),
        "mtp_layers": next((config[key] for key in MTP_KEYS.values() if key in config), 1),
    }


def _moe(config: Config, num_layers: int, count: int, top_k: int, *, renormalised: bool) -> MixtureOfExperts:
    dense, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step", 1)
    return MixtureOfExperts(
        num_experts=config.get("num_experts", config.get("num_local_experts", count)),
        top_k=config.get("num_experts_per_tok", top_k),
        ffn_size=config.get("moe_intermediate_size", 512),
        layers=tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0),
        pre_softmax=not renormalised,
        shared_ffn_size=config.get("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


def _extra(a: Architecture) -> dict[str, Any]:
    linear = a.linear
    assert linear is not None
    types = ["linear_attention" if layer in linear.layers else "full_attention" for layer in range(a.num_layers)]
    found = standard.extra(a) | {
        "layer_types": types, "attention_bias": False, "partial_rotary_factor": a.rope.fraction if a.rope else 1.0,
        "linear_num_key_heads": linear.key_heads, "linear_num_value_heads": linear.value_heads,
        "linear_key_head_dim": linear.key_dim, "linear_value_head_dim": linear.value_dim,
        "linear_conv_kernel_dim": linear.kernel,
        MTP_KEYS["qwen3_next" if a.family == "qwen3_next" else "qwen3_5"]: a.mtp_layers,
    }  # fmt: skip
    if moe := a.moe:
        found |= {
            "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.ffn_size,
            "shared_expert_intermediate_size": moe.shared_ffn_size, "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(a.num_layers) if layer not in moe.layers],
            "norm_topk_prob": not moe.pre_softmax,
        }  # fmt: skip
    return found


def _refuse(config: Config) -> str | None:
    if config.get("attention_bias"):
        return "attention_bias: the table is for attention without biases"
    if "full_attention" not in (config.get("layer_types") or ["full_attention"]):
        return "layer_types has no full attention at all"
    return rope_refusal(config, partial=True)


def _next(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    renormalised = config.get("norm_topk_prob", True)
    return _derived(config, values, 2) | {"moe": _moe(config, values["num_layers"], 512, 10, renormalised=renormalised)}


def _moe_3_5(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    # this router always renormalises, whatever norm_topk_prob says
    return _derived(config, values, 2) | {"moe": _moe(config, values["num_layers"], 256, 8, renormalised=True)}


def _family(
    model_type: str, architecture: str, in_proj: Row, derived: Any, dialects: tuple[Dialect, ...] = (), **defaults: Any
) -> Family:  # fmt: skip
    return Family(
        model_type,
        architecture,
        standard.table(num_attention_heads=16, max_position_embeddings=32768, **defaults),
        lambda a: _rules(a, in_proj),
        fixed={"norm": "rms", "gated": True, "qk_norm": True, "output_gate": True, "centred_norms": True},
        derived=derived,
        extra=_extra,
        refuse=_refuse,
        ignored=standard.ROTARY_BUFFERS,
        mtp_prefix="mtp.",
        dialects=dialects,
    )


QWEN3_NEXT = _family(
    "qwen3_next", "Qwen3NextForCausalLM", IN_PROJ_GROUPED, _next, QWEN,
    vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=48,
)  # fmt: skip
QWEN3_5 = _family(
    "qwen3_5_text", "Qwen3_5ForCausalLM", IN_PROJ_APART, lambda config, values: _derived(config, values, 4),
    vocab_size=248320, hidden_size=4096, intermediate_size=12288,
)  # fmt: skip
QWEN3_5_MOE = _family(
    "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", IN_PROJ_APART, _moe_3_5, QWEN,
    vocab_size=248320, hidden_size=2048, num_hidden_layers=40,
)  # fmt: skip
