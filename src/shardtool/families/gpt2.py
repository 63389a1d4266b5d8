"""GPT-2: LayerNorm with bias, learned positions, biases everywhere, transposed Conv1D weights, fused and stacked q, k, v."""

from __future__ import annotations

from typing import Any

from shardtool.families.architecture import Architecture
from shardtool.families.blocks import (
    FC1,
    FC2,
    FINAL_NORM,
    HIDDEN,
    INPUT_NORM,
    LINEAR_OUT,
    LINEAR_QKV,
    MLP_NORM,
    POSITIONS,
    Row,
    embedding,
    layers,
)  # fmt: skip
from shardtool.families.family import Config, Family, Field
from shardtool.layout.rules import Rule, rule

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}

# fmt: off
LAYER: list[Row] = [
    ("ln_1.weight",        HIDDEN,                                               INPUT_NORM + "_weight", None),
    ("ln_1.bias",          HIDDEN,                                               INPUT_NORM + "_bias",   None),
    ("attn.c_attn.weight", "h (g q d + g d + g d) -> (g (q d + d + d)) h",       LINEAR_QKV + ".weight", "g"),
    ("attn.c_attn.bias",   "(g q d + g d + g d) -> (g (q d + d + d))",           LINEAR_QKV + ".bias",   "g"),
    ("attn.c_proj.weight", "(g q d) h -> h (g q d)",                             LINEAR_OUT + ".weight", "g"),
    ("attn.c_proj.bias",   HIDDEN,                                               LINEAR_OUT + ".bias",   None),
    ("ln_2.weight",        HIDDEN,                                               MLP_NORM + "_weight",   None),
    ("ln_2.bias",          HIDDEN,                                               MLP_NORM + "_bias",     None),
    ("mlp.c_fc.weight",    "h f -> f h",                                         FC1 + ".weight",        "f"),
    ("mlp.c_fc.bias",      "f -> f",                                             FC1 + ".bias",          "f"),
    ("mlp.c_proj.weight",  "f h -> h f",                                         FC2 + ".weight",        "f"),
    ("mlp.c_proj.bias",    HIDDEN,                                               FC2 + ".bias",          None),
]

CONFIG = (
    Field("num_layers",        "n_layer",             12),
    Field("hidden_size",       "n_embd",              768),
    Field("num_heads",         "n_head",              12),
    Field("vocab_size",        "vocab_size",          50257),
    Field("max_positions",     "n_positions",         1024),
    Field("norm_eps",          "layer_norm_epsilon",  1e-5, float),
    Field("tied",              "tie_word_embeddings", True, bool),
    Field("activation",        "activation_function", "gelu_new", ACTIVATIONS.__getitem__, ACTIVATION_NAMES.__getitem__),
    Field("attention_dropout", "attn_pdrop",          0.1, float),
    Field("hidden_dropout",    "resid_pdrop",         0.1, float),
)
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("transformer.wte.weight", "lm_head.weight", tied=a.tied),
        rule("transformer.wpe.weight", "p h -> p h", POSITIONS),
        *layers("transformer.h.{l}.", LAYER),
        rule("transformer.ln_f.weight", HIDDEN, FINAL_NORM + ".weight"),
        rule("transformer.ln_f.bias", HIDDEN, FINAL_NORM + ".bias"),
    )


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_query_groups": values["num_heads"],
        "head_dim": values["hidden_size"] // values["num_heads"],
        "ffn_size": config.get("n_inner") or 4 * values["hidden_size"],
    }


def _refuse(config: Config) -> str | None:
    for key, right, why in (
        ("scale_attn_weights", True, "attention scores are not scaled"),
        ("scale_attn_by_inverse_layer_idx", False, "attention scores are scaled by the layer's number"),
        ("add_cross_attention", False, "it has cross attention"),
    ):
        if bool(config.get(key, right)) != right:
            return f"{key} is {config[key]}: {why}"
    return None


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    CONFIG,
    _rules,
    fixed={"norm": "layer", "gated": False, "linear_bias": True, "rope": None},
    derived=_derived,
    extra=lambda a: {"n_inner": a.ffn_size, "embd_pdrop": a.hidden_dropout},
    refuse=_refuse,
    # the causal mask is a buffer in files of old transformers versions
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    prefix="transformer.",
)
