"""StarCoder2: LayerNorm, biases everywhere, a plain MLP (c_fc, c_proj) with tanh GELU, rope, a sliding window."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import (
    DOWN,
    FC1,
    FC2,
    FINAL_NORM,
    HIDDEN,
    MLP_NORM,
    UP,
    Row,
    attention,
    embedding,
    layers,
)  # fmt: skip
from shardtool.families.family import Config, Family, Field
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule, rule

# fmt: off
MLP: list[Row] = [
    ("post_attention_layernorm.weight", HIDDEN,   MLP_NORM + "_weight", None),
    ("post_attention_layernorm.bias",   HIDDEN,   MLP_NORM + "_bias",   None),
    ("mlp.c_fc.weight",                 UP,       FC1 + ".weight",      "f"),
    ("mlp.c_fc.bias",                   "f -> f", FC1 + ".bias",        "f"),
    ("mlp.c_proj.weight",               DOWN,     FC2 + ".weight",      "f"),
    ("mlp.c_proj.bias",                 HIDDEN,   FC2 + ".bias",        None),
]
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("model.embed_tokens.weight", "lm_head.weight", tied=a.tied),
        *layers("model.layers.{l}.", attention(a) + MLP),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
        rule("model.norm.bias", HIDDEN, FINAL_NORM + ".bias"),
    )


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    found = standard.derived(groups=2)(config, values)
    # this class has no head_dim of its own
    return found | {"window": config.get("sliding_window"), "head_dim": values["hidden_size"] // values["num_heads"]}


def _refuse(config: Config) -> str | None:
    if not config.get("use_bias", True):
        return "use_bias is off: the table has biases on every linear"
    return rope_refusal(config)


FAMILY = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    (
        *(
            field
            for field in standard.table(
                vocab_size=49152, hidden_size=3072, intermediate_size=12288, num_hidden_layers=30, num_attention_heads=24,
                max_position_embeddings=4096, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
            )
            if field.name != "norm_eps"
        ),
        Field("norm_eps", "norm_epsilon", 1e-5, float),
        Field("hidden_dropout", "residual_dropout", 0.0, float),
    ),
    _rules,
    fixed={"norm": "layer", "gated": False, "linear_bias": True},
    derived=_derived,
    extra=lambda a: standard.extra(a) | {"sliding_window": a.window, "use_bias": True},
    refuse=_refuse,
)  # fmt: skip
