"""Gemma 1: gamma stored as gamma - 1, embeddings times the root of the hidden size, GEGLU.

The factor sits between an embedding and a head that are one tensor. Megatron has none, so its embedding contains it,
and the head is a tensor of its own.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, Folded
from shardtool.families.blocks import FINAL_NORM, HIDDEN, attention, layers, mlp, scaled_embedding, stored_centred
from shardtool.families.family import Config, Family, Field
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule, rule


def _rules(a: Architecture) -> tuple[Rule, ...]:
    assert a.folded is not None
    return stored_centred(
        (
            *scaled_embedding("model.embed_tokens.weight", "lm_head.weight", a.folded),
            *layers("model.layers.{l}.", attention(a) + mlp(a)),
            rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
        )
    )


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    # transformers 5: the factor is rounded to the dtype of the embedding, 55.5 instead of 55.43 for 3072 in bf16
    folded = Folded(sqrt(values["hidden_size"]), rounded=True, tied=bool(config.get("tie_word_embeddings", True)))
    return standard.derived(head_dim=256, groups=16)(config, values) | {"folded": folded}


def _extra(a: Architecture) -> dict[str, Any]:
    tied = a.folded is None or a.folded.tied
    return standard.extra(a) | {"tie_word_embeddings": tied, "attention_bias": False}


def _refuse(config: Config) -> str | None:
    if config.get("attention_bias"):
        return "attention_bias: a bias on q, k, v and o without one in the MLP; megatron-core has all or qkv alone"
    if config.get("use_bidirectional_attention"):
        return "use_bidirectional_attention: megatron-core's GPTModel is causal"
    return rope_refusal(config)


def _caveats(_: Architecture) -> tuple[str, ...]:
    return (
        "Megatron's embedding contains Gemma's factor, the root of the hidden size, and the head is a tensor of its own: "
        "training moves them apart. In bf16 and fp16 factor and product are rounded as transformers does it in that dtype: "
        "compare such a checkpoint with `verify --dtype native`, in fp32 the rounding shows",
    )


FAMILY = Family(
    "gemma",
    "GemmaForCausalLM",
    (
        *(
            field
            for field in standard.table(
                vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
                num_attention_heads=16, max_position_embeddings=8192,
            )
            if field.name not in ("tied", "activation")
        ),
        # "gelu" in the released configs means the tanh form (transformers 5 configuration_gemma.py)
        Field(
            "activation", "hidden_act", "gelu_pytorch_tanh",
            lambda name: standard.ACTIVATIONS["gelu_pytorch_tanh" if name == "gelu" else name],
            standard.ACTIVATION_NAMES.__getitem__,
        ),
    ),
    _rules,
    fixed={"norm": "rms", "gated": True, "centred_norms": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    caveats=_caveats,
)  # fmt: skip
