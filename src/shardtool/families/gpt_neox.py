"""GPT-NeoX with attention and MLP one after the other (RedPajama-INCITE): Megatron's own layout, biases everywhere.

Pythia and GPT-NeoX-20B have both read the same input, which megatron-core's layers do not.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from shardtool.families import standard_config as standard
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
    UP,
    Row,
    embedding,
    layers,
)  # fmt: skip
from shardtool.families.dialects import GPT_NEOX
from shardtool.families.family import Config, Family, Field
from shardtool.families.rope import read_rope, rope_refusal, write_rope
from shardtool.layout.rules import Rule, rule

# fmt: off
LAYER: list[Row] = [
    ("input_layernorm.weight",            HIDDEN, INPUT_NORM + "_weight", None),
    ("input_layernorm.bias",              HIDDEN, INPUT_NORM + "_bias",   None),
    ("attention.query_key_value.weight",  "(g (q d + d + d)) h -> (g (q d + d + d)) h", LINEAR_QKV + ".weight", "g"),
    ("attention.query_key_value.bias",    "(g (q d + d + d)) -> (g (q d + d + d))",     LINEAR_QKV + ".bias",   "g"),
    ("attention.dense.weight",            OUT,    LINEAR_OUT + ".weight", "g"),
    ("attention.dense.bias",              HIDDEN, LINEAR_OUT + ".bias",   None),
    ("post_attention_layernorm.weight",   HIDDEN, MLP_NORM + "_weight",   None),
    ("post_attention_layernorm.bias",     HIDDEN, MLP_NORM + "_bias",     None),
    ("mlp.dense_h_to_4h.weight",          UP,     FC1 + ".weight",        "f"),
    ("mlp.dense_h_to_4h.bias",            "f -> f", FC1 + ".bias",        "f"),
    ("mlp.dense_4h_to_h.weight",          DOWN,   FC2 + ".weight",        "f"),
    ("mlp.dense_4h_to_h.bias",            HIDDEN, FC2 + ".bias",          None),
]
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("gpt_neox.embed_in.weight", "embed_out.weight", tied=a.tied),
        *layers("gpt_neox.layers.{l}.", LAYER),
        rule("gpt_neox.final_layer_norm.weight", HIDDEN, FINAL_NORM + ".weight"),
        rule("gpt_neox.final_layer_norm.bias", HIDDEN, FINAL_NORM + ".bias"),
    )


def _renamed(config: Config) -> Config:
    """The rotary keys of transformers 4 under the names that other families have."""
    names = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    return {**config, **{name: config[old] for old, name in names.items() if config.get(old) is not None}}


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_query_groups": values["num_heads"],
        "head_dim": values["hidden_size"] // values["num_heads"],
        "rope": read_rope(_renamed(config), fraction=0.25),
    }


def _extra(a: Architecture) -> dict[str, Any]:
    assert a.rope is not None
    scaling = write_rope(replace(a.rope, fraction=1.0))
    return {
        "rotary_emb_base": a.rope.theta,
        "rotary_pct": a.rope.fraction,
        "rope_scaling": scaling["rope_scaling"],
        "use_parallel_residual": False,
        "attention_bias": True,
    }


def _refuse(config: Config) -> str | None:
    if config.get("use_parallel_residual", True):
        return "use_parallel_residual: attention and MLP read the same input, megatron-core has no such layer"
    if not config.get("attention_bias", True):
        return "attention_bias is off and the MLP has biases; megatron-core has biases on all linears, or on qkv alone"
    return rope_refusal(_renamed(config), partial=True)


FAMILY = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    (
        *(
            field
            for field in standard.table(
                vocab_size=50432, hidden_size=6144, intermediate_size=24576, num_hidden_layers=44, num_attention_heads=64,
                hidden_act="gelu",
            )
            if field.name != "norm_eps"
        ),
        Field("norm_eps", "layer_norm_eps", 1e-5, float),
        Field("hidden_dropout", "hidden_dropout", 0.0, float),
    ),
    _rules,
    fixed={"norm": "layer", "gated": False, "linear_bias": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    dialects=GPT_NEOX,
)  # fmt: skip
