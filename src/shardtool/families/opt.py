"""OPT: LayerNorm, learned positions, biases everywhere, ReLU.

The table of positions begins with two rows that no token uses: positions start at row 2, and row 1 is what padding gets
(transformers 5 modeling_opt.py). They go to the end of Megatron's table, where no position reaches them, and come back.
"""

from __future__ import annotations

from typing import Any

from shardtool.families.architecture import Architecture
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
    POSITIONS,
    QKV,
    QKV_BIAS,
    UP,
    Row,
    embedding,
    layers,
)  # fmt: skip
from shardtool.families.family import Config, Family, Field
from shardtool.layout.rules import Rule, rule

SPARE_ROWS = 2
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
ACTIVATION_NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}

# fmt: off
LAYER: list[Row] = [
    ("self_attn_layer_norm.weight", HIDDEN, INPUT_NORM + "_weight", None),
    ("self_attn_layer_norm.bias",   HIDDEN, INPUT_NORM + "_bias",   None),
    (("self_attn.q_proj.weight", "self_attn.k_proj.weight",
      "self_attn.v_proj.weight"),   QKV,    LINEAR_QKV + ".weight", "g"),
    ("self_attn.out_proj.weight",   OUT,    LINEAR_OUT + ".weight", "g"),
    ("final_layer_norm.weight",     HIDDEN, MLP_NORM + "_weight",   None),
    ("final_layer_norm.bias",       HIDDEN, MLP_NORM + "_bias",     None),
    ("fc1.weight",                  UP,     FC1 + ".weight",        "f"),
    ("fc2.weight",                  DOWN,   FC2 + ".weight",        "f"),
]
BIASES: list[Row] = [
    (("self_attn.q_proj.bias", "self_attn.k_proj.bias",
      "self_attn.v_proj.bias"),   QKV_BIAS, LINEAR_QKV + ".bias",   "g"),
    ("self_attn.out_proj.bias",     HIDDEN, LINEAR_OUT + ".bias",   None),
    ("fc1.bias",                  "f -> f", FC1 + ".bias",          "f"),
    ("fc2.bias",                    HIDDEN, FC2 + ".bias",          None),
]

CONFIG = (
    Field("num_layers",        "num_hidden_layers",       12),
    Field("hidden_size",       "hidden_size",             768),
    Field("num_heads",         "num_attention_heads",     12),
    Field("ffn_size",          "ffn_dim",                 3072),
    Field("vocab_size",        "vocab_size",              50272),
    Field("max_positions",     "max_position_embeddings", 2048),
    Field("tied",              "tie_word_embeddings",     True, bool),
    Field("linear_bias",       "enable_bias",             True, bool),
    Field("activation",        "activation_function",     "relu", ACTIVATIONS.__getitem__, ACTIVATION_NAMES.__getitem__),
    Field("attention_dropout", "attention_dropout",       0.0, float),
    Field("hidden_dropout",    "dropout",                 0.1, float),
)
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    at = "model.decoder."
    return (
        *embedding(at + "embed_tokens.weight", "lm_head.weight", tied=a.tied),
        rule(at + "embed_positions.weight", "(spare + p) h -> (p + spare) h", POSITIONS),
        *layers(at + "layers.{l}.", LAYER + (BIASES if a.linear_bias else [])),
        rule(at + "final_layer_norm.weight", HIDDEN, FINAL_NORM + ".weight"),
        rule(at + "final_layer_norm.bias", HIDDEN, FINAL_NORM + ".bias"),
    )


def _derived(_: Config, values: dict[str, Any]) -> dict[str, Any]:
    return {"num_query_groups": values["num_heads"], "head_dim": values["hidden_size"] // values["num_heads"]}


def _refuse(config: Config) -> str | None:
    width = config.get("word_embed_proj_dim")
    if width is not None and width != config.get("hidden_size", 768):
        return "word_embed_proj_dim is not hidden_size: embeddings are projected, megatron-core has no such linear"
    for key, right, why in (
        ("do_layer_norm_before", True, "norms come after attention and MLP, megatron-core has them before"),
        ("_remove_final_layer_norm", False, "there is no norm after the last layer, megatron-core's GPTModel has one"),
        ("layer_norm_elementwise_affine", True, "norms have no weights, megatron-core's have"),
    ):
        if bool(config.get(key, right)) != right:
            return f"{key} is {config[key]}: {why}"
    return None


def _caveats(a: Architecture) -> tuple[str, ...]:
    return (
        f"OPT's two unused rows of positions are the last two of Megatron's table of "
        f"{a.max_positions + a.spare_positions}: keep --max-position-embeddings, and --seq-length at {a.max_positions}",
    )


FAMILY = Family(
    "opt",
    "OPTForCausalLM",
    CONFIG,
    _rules,
    fixed={"norm": "layer", "norm_eps": 1e-5, "gated": False, "rope": None, "spare_positions": SPARE_ROWS},
    derived=_derived,
    extra=lambda a: {
        "word_embed_proj_dim": a.hidden_size,
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
    },
    refuse=_refuse,
    prefix="model.",
    caveats=_caveats,
)
