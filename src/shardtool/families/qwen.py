"""Qwen-1 (remote code): q, k, v stacked with bias; w2 is the gate and w1 the up projection; intermediate_size counts both.

Log-n attention and dynamic NTK set in beyond `seq_length`, so that is the longest sequence that converts exactly.
"""

from __future__ import annotations

from typing import Any

from shardtool.families.architecture import Architecture, Rope
from shardtool.families.blocks import (
    DOWN,
    FC1,
    FC2,
    FINAL_NORM,
    GLU,
    HIDDEN,
    INPUT_NORM,
    LINEAR_OUT,
    LINEAR_QKV,
    MLP_NORM,
    OUT,
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
    ("ln_1.weight",                      HIDDEN,           INPUT_NORM + "_weight", None),
    ("attn.c_attn.weight",               STACKED_QKV,      LINEAR_QKV + ".weight", "g"),
    ("attn.c_attn.bias",                 STACKED_QKV_BIAS, LINEAR_QKV + ".bias",   "g"),
    ("attn.c_proj.weight",               OUT,              LINEAR_OUT + ".weight", "g"),
    ("ln_2.weight",                      HIDDEN,           MLP_NORM + "_weight",   None),
    (("mlp.w2.weight", "mlp.w1.weight"), GLU,              FC1 + ".weight",        "f"),
    ("mlp.c_proj.weight",                DOWN,             FC2 + ".weight",        "f"),
]

CONFIG = (
    Field("num_layers",        "num_hidden_layers",       32),
    Field("hidden_size",       "hidden_size",             4096),
    Field("num_heads",         "num_attention_heads",     32),
    Field("ffn_size",          "intermediate_size",       22016, lambda both: both // 2, lambda rows: 2 * rows),
    Field("vocab_size",        "vocab_size",              151936),
    Field("max_positions",     "seq_length",              8192),
    Field("norm_eps",          "layer_norm_epsilon",      1e-6, float),
    Field("head_dim",          "kv_channels",             128),
    Field("tied",              "tie_word_embeddings",     False, bool),
    Field("attention_dropout", "attn_dropout_prob",       0.0, float),
)
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("transformer.wte.weight", "lm_head.weight", tied=a.tied),
        *layers("transformer.h.{l}.", LAYER),
        rule("transformer.ln_f.weight", HIDDEN, FINAL_NORM + ".weight"),
    )


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return {"num_query_groups": values["num_heads"], "rope": Rope(float(config.get("rotary_emb_base", 10000)))}


def _refuse(config: Config) -> str | None:
    if not config.get("no_bias", True):
        return "no_bias is off: the table has biases on q, k and v alone"
    if config.get("rotary_pct", 1.0) != 1.0:
        return f"rotary_pct {config['rotary_pct']}: this family's attention rotates whole heads"
    return None


def _limit(config: Config) -> str | None:
    own = {"use_logn_attn": "log-n attention", "use_dynamic_ntk": "dynamic NTK"}
    used = [text for key, text in own.items() if config.get(key, True)]
    return f"{' and '.join(used)} set in beyond seq_length" if used else None


FAMILY = Family(
    "qwen",
    "QWenLMHeadModel",
    CONFIG,
    _rules,
    fixed={"norm": "rms", "gated": True, "qkv_bias": True, "activation": "silu"},
    derived=_derived,
    extra=lambda a: {"rotary_emb_base": a.rope.theta if a.rope else 10000.0, "rotary_pct": 1.0, "no_bias": True},
    refuse=_refuse,
    own_rope=True,
    limit=_limit,
    ignored=(r"transformer\.rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\.(masked_bias|logn_tensor)"),
)
