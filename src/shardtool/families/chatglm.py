"""ChatGLM2, ChatGLM3 and GLM-4-9B in its remote-code form: q, k, v stacked, gate and up in one tensor as Megatron has them,
rope on interleaved pairs of the first half of each head, base 10000 x rope_ratio."""

from __future__ import annotations

from typing import Any

from shardtool.families.architecture import Architecture, Rope
from shardtool.families.blocks import (
    DOWN,
    FC1,
    FC2,
    FINAL_NORM,
    HIDDEN,
    INPUT_NORM,
    LINEAR_OUT,
    LINEAR_QKV,
    MLP_NORM,
    OUT,
    STACKED_GLU,
    STACKED_QKV,
    STACKED_QKV_BIAS,
    Row,
    embedding,
    layers,
)  # fmt: skip
from shardtool.families.family import Config, Family, Field
from shardtool.layout.rules import Rule, rule

# fmt: off
LAYER: list[Row] = [
    ("input_layernorm.weight",                 HIDDEN,           INPUT_NORM + "_weight", None),
    ("self_attention.query_key_value.weight",  STACKED_QKV,      LINEAR_QKV + ".weight", "g"),
    ("self_attention.query_key_value.bias",    STACKED_QKV_BIAS, LINEAR_QKV + ".bias",   "g"),
    ("self_attention.dense.weight",            OUT,              LINEAR_OUT + ".weight", "g"),
    ("post_attention_layernorm.weight",        HIDDEN,           MLP_NORM + "_weight",   None),
    ("mlp.dense_h_to_4h.weight",               STACKED_GLU,      FC1 + ".weight",        "f"),
    ("mlp.dense_4h_to_h.weight",               DOWN,             FC2 + ".weight",        "f"),
]

CONFIG = (
    Field("num_layers",        "num_layers",           28),
    Field("hidden_size",       "hidden_size",          4096),
    Field("num_heads",         "num_attention_heads",  32),
    Field("head_dim",          "kv_channels",          128),
    Field("ffn_size",          "ffn_hidden_size",      13696),
    Field("vocab_size",        "padded_vocab_size",    65024),
    Field("max_positions",     "seq_length",           2048),
    Field("norm_eps",          "layernorm_epsilon",    1e-5, float),
    Field("tied",              "tie_word_embeddings",  False, bool),
    Field("attention_dropout", "attention_dropout",    0.0, float),
    Field("hidden_dropout",    "hidden_dropout",       0.0, float),
)
RIGHT = {
    "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False, "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
}
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight", tied=a.tied),
        *layers("transformer.encoder.layers.{l}.", LAYER),
        rule("transformer.encoder.final_layernorm.weight", HIDDEN, FINAL_NORM + ".weight"),
    )


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    groups = config.get("multi_query_group_num", 1) if config.get("multi_query_attention") else values["num_heads"]
    return {"num_query_groups": groups, "rope": Rope(10000.0 * float(config.get("rope_ratio", 1)), 0.5, True)}


def _extra(a: Architecture) -> dict[str, Any]:
    theta = a.rope.theta if a.rope else 10000.0
    return {
        **RIGHT,
        "multi_query_attention": True,
        "multi_query_group_num": a.num_query_groups,
        "rope_ratio": theta / 10000.0,
    }


def _refuse(config: Config) -> str | None:
    if "multi_query_attention" not in config:
        return "this is the first ChatGLM: it has 2-D positions and another residual"
    for key, right in RIGHT.items():
        if bool(config.get(key, right)) != right:
            return f"{key} is {config[key]}: the table is for {right}"
    return None


FAMILY = Family(
    "chatglm",
    "ChatGLMModel",
    CONFIG,
    _rules,
    fixed={"norm": "rms", "gated": True, "qkv_bias": True, "activation": "silu"},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    own_rope=True,
    ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
)
