"""Baichuan 1 and 2, 7B (remote code): Llama with q, k, v stacked in W_pack; Baichuan 2 normalises its head's rows.

Megatron's head is the normalised one, and so is the head that comes back: the scale of the rows, which the model never
uses, is lost. The 13B models use ALiBi, which Megatron has not.
"""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, Folded
from shardtool.families.blocks import (
    FINAL_NORM,
    HIDDEN,
    INPUT_NORM,
    LINEAR_OUT,
    LINEAR_QKV,
    OUT,
    OUTPUT,
    STACKED_QKV,
    Row,
    embedding,
    layers,
    mlp,
    with_codec,
)  # fmt: skip
from shardtool.families.family import Config, Family
from shardtool.layout.codecs import NormalisedRows
from shardtool.layout.rules import Rule, rule

VOCAB_2 = 125696  # Baichuan 2's vocabulary; Baichuan 1 has 64000 tokens

# fmt: off
ATTENTION: list[Row] = [
    ("input_layernorm.weight",  HIDDEN,      INPUT_NORM + "_weight", None),
    ("self_attn.W_pack.weight", STACKED_QKV, LINEAR_QKV + ".weight", "g"),
    ("self_attn.o_proj.weight", OUT,         LINEAR_OUT + ".weight", "g"),
]
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    found = (
        *embedding("model.embed_tokens.weight", "lm_head.weight", tied=a.tied),
        *layers("model.layers.{l}.", ATTENTION + mlp(a)),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    )
    return with_codec(found, NormalisedRows(), OUTPUT) if a.folded and a.folded.normalised_head else found


def _is_second(config: Config) -> bool:
    """Baichuan 2 has the same class and model_type; its configuration class has one more key."""
    return config.get("vocab_size") == VOCAB_2 or "z_loss_weight" in config


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    folded = Folded(normalised_head=True) if _is_second(config) else None
    return {"folded": folded} | standard.derived()({**config, "num_key_value_heads": None, "head_dim": None}, values)


def _refuse(config: Config) -> str | None:
    if "max_position_embeddings" not in config or config.get("num_attention_heads") == 40:
        return "this is a 13B model: it uses ALiBi, and megatron-core has no such positions"
    if not _is_second(config) and config.get("vocab_size", 0) > VOCAB_2:
        return (
            f"a vocabulary of {config['vocab_size']} tokens: it looks like a Baichuan 2 with tokens added, whose head is "
            'normalised (say so with "z_loss_weight": 0 in config.json)'
        )
    if _is_second(config) and config.get("tie_word_embeddings"):
        return "tie_word_embeddings with a normalised head: embedding and head are not the same values"
    return None


def _caveats(a: Architecture) -> tuple[str, ...]:
    if not (a.folded and a.folded.normalised_head):
        return ()
    return (
        "Baichuan 2 normalises the rows of its head in the forward pass: Megatron gets the normalised head, whose rows "
        "training no longer normalises; the scale of the rows does not come back",
    )


FAMILY = Family(
    "baichuan",
    "BaichuanForCausalLM",
    standard.table(vocab_size=64000, max_position_embeddings=4096),
    _rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=lambda a: {"z_loss_weight": 0} if a.folded and a.folded.normalised_head else {},
    refuse=_refuse,
    own_rope=True,
    ignored=standard.ROTARY_BUFFERS,
    caveats=_caveats,
)
