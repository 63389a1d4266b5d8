"""The Megatron side of the tables, and the equations that several families use.

A row of a table is (Hugging Face names, equation, Megatron key, axis that tp shards). Axes: l layer, v vocabulary,
p position, h hidden, g query group, q query head in its group, d head dim, f MLP rows.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardtool.families.architecture import Architecture
from shardtool.layout.rules import Rule, rule

Row = tuple[str | tuple[str, ...], str, str, str | None]

# fmt: off
QKV      = "(g q d) h, (g d) h, (g d) h -> (g (q d + d + d)) h"
QKV_BIAS = "(g q d), (g d), (g d) -> (g (q d + d + d))"
OUT      = "h (g q d) -> h (g q d)"
GLU      = "f h, f h -> (f + f) h"
GLU_BIAS = "f, f -> (f + f)"
UP       = "f h -> f h"
DOWN     = "h f -> h f"
HIDDEN   = "h -> h"
HEAD     = "d -> d"
VOCAB    = "v h -> v h"

EMBEDDING  = "embedding.word_embeddings.weight"
POSITIONS  = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm"
OUTPUT     = "output_layer.weight"
INPUT_NORM = "self_attention.linear_qkv.layer_norm"
LINEAR_QKV = "self_attention.linear_qkv"
LINEAR_OUT = "self_attention.linear_proj"
Q_NORM     = "self_attention.q_layernorm"
K_NORM     = "self_attention.k_layernorm"
MLP_NORM   = "mlp.linear_fc1.layer_norm"
FC1        = "mlp.linear_fc1"
FC2        = "mlp.linear_fc2"
# fmt: on


def embedding(name: str, head: str, *, tied: bool) -> tuple[Rule, ...]:
    """Input embedding and head. Tied: one component, which may also be on disk under the head's name."""
    if tied:
        return (rule(name, VOCAB, EMBEDDING, "v", copies=(head,), tied_copy=OUTPUT),)
    return (rule(name, VOCAB, EMBEDDING, "v"), rule(head, VOCAB, OUTPUT, "v"))


def layers(prefix: str, rows: Iterable[Row]) -> tuple[Rule, ...]:
    """Per-layer rules; names are relative to `prefix` on the left and to decoder.layers.{l}. on the right."""
    found = []
    for hf, equation, megatron, tp in rows:
        names = (hf,) if isinstance(hf, str) else hf
        found.append(rule([prefix + name for name in names], equation, "decoder.layers.{l}." + megatron, tp))
    return tuple(found)


def standard(a: Architecture) -> tuple[Rule, ...]:
    """The layout of Llama's keys, with a row for everything that an Architecture can have.

    Llama, Mistral, Qwen2 and Qwen3 are exactly this with their switches; a Megatron checkpoint without a
    Hugging Face family (resharding) uses it for its Megatron side.
    """
    # fmt: off
    table: list[Row] = [
        ("input_layernorm.weight",                                    HIDDEN,   INPUT_NORM + "_weight", None),
        (("self_attn.q_proj.weight", "self_attn.k_proj.weight",
          "self_attn.v_proj.weight"),                                 QKV,      LINEAR_QKV + ".weight", "g"),
        ("self_attn.o_proj.weight",                                   OUT,      LINEAR_OUT + ".weight", "g"),
        ("post_attention_layernorm.weight",                           HIDDEN,   MLP_NORM + "_weight",   None),
        ("mlp.down_proj.weight",                                      DOWN,     FC2 + ".weight",        "f"),
    ]
    if a.gated:
        table += [(("mlp.gate_proj.weight", "mlp.up_proj.weight"),    GLU,      FC1 + ".weight",        "f")]
    else:
        table += [("mlp.up_proj.weight",                              UP,       FC1 + ".weight",        "f")]
    if a.qkv_bias or a.linear_bias:
        table += [(("self_attn.q_proj.bias", "self_attn.k_proj.bias",
                    "self_attn.v_proj.bias"),                         QKV_BIAS, LINEAR_QKV + ".bias",   "g")]
    if a.linear_bias:
        table += [("self_attn.o_proj.bias",                           HIDDEN,   LINEAR_OUT + ".bias",   None),
                  ("mlp.down_proj.bias",                              HIDDEN,   FC2 + ".bias",          None)]
        if a.gated:
            table += [(("mlp.gate_proj.bias", "mlp.up_proj.bias"),    GLU_BIAS, FC1 + ".bias",          "f")]
        else:
            table += [("mlp.up_proj.bias",                            "f -> f", FC1 + ".bias",          "f")]
    if a.qk_norm:
        table += [("self_attn.q_norm.weight",                         HEAD,     Q_NORM + ".weight",     None),
                  ("self_attn.k_norm.weight",                         HEAD,     K_NORM + ".weight",     None)]
    if a.norm == "layer":
        table += [("input_layernorm.bias",                            HIDDEN,   INPUT_NORM + "_bias",   None),
                  ("post_attention_layernorm.bias",                   HIDDEN,   MLP_NORM + "_bias",     None)]
    # fmt: on
    rules = [
        *embedding("model.embed_tokens.weight", "lm_head.weight", tied=a.tied),
        *layers("model.layers.{l}.", table),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    ]
    if a.norm == "layer":
        rules.append(rule("model.norm.bias", HIDDEN, FINAL_NORM + ".bias"))
    if a.rope is None:
        rules.append(rule("model.embed_positions.weight", "p h -> p h", POSITIONS))
    return tuple(rules)


def axis_sizes(a: Architecture) -> dict[str, int]:
    """The size of every axis."""
    return {
        "l": a.num_layers,
        "v": a.vocab_size,
        "p": a.max_positions,
        "h": a.hidden_size,
        "g": a.num_query_groups,
        "q": a.num_heads // a.num_query_groups,
        "d": a.head_dim,
        "f": a.ffn_size,
    }
