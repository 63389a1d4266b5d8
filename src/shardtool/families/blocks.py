"""The Megatron side of the tables, and the equations that several families use.

A row of a table is (Hugging Face names, equation, Megatron key, axis that tp shards). Axes: l layer, v vocabulary,
p position, spare rows of positions, h hidden, g query group, q query head in its group, d head dim, f MLP rows;
e expert, x rows of an expert, s rows of the shared expert; n attention head, k query dims, u key and value dims,
w value dims of a head (latent attention), y query rank, z key-value rank, j rows of the key-value down projection;
m MTP layer, o hidden as output, token and state the two inputs of an MTP layer, hidden each; t key head, r value head
of a key head, a key dim, b value dim, c kernel (linear attention).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from shardtool.families.architecture import Architecture, Folded
from shardtool.layout.codecs import CENTRED, Affine, Codec
from shardtool.layout.rules import Rule, rule

Row = tuple[str | tuple[str, ...], str, str, str | None]

# fmt: off
QKV      = "(g q d) h, (g d) h, (g d) h -> (g (q d + d + d)) h"
QKV_BIAS = "(g q d), (g d), (g d) -> (g (q d + d + d))"
GATED_QKV = "(g q (d + d)) h, (g d) h, (g d) h -> (g (q d + q d + d + d)) h"  # the output gate behind each query head
OUT      = "h (g q d) -> h (g q d)"
GLU      = "f h, f h -> (f + f) h"
GLU_BIAS = "f, f -> (f + f)"
UP       = "f h -> f h"
DOWN     = "h f -> h f"
HIDDEN   = "h -> h"
HEAD     = "d -> d"
VOCAB    = "v h -> v h"
POSITION = "p h -> p h"
SPARE_POSITION = "(p + spare) h -> (p + spare) h"
STACKED_QKV = "(g q d + g d + g d) h -> (g (q d + d + d)) h"
STACKED_QKV_BIAS = "(g q d + g d + g d) -> (g (q d + d + d))"
MTP_INPUT = "o (token + state) -> o (token + state)"
STACKED_GLU = "(f + f) h -> (f + f) h"

EMBEDDING  = "embedding.word_embeddings.weight"
POSITIONS  = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm"
OUTPUT     = "output_layer.weight"
INPUT_NORM = "self_attention.linear_qkv.layer_norm"
LINEAR_QKV = "self_attention.linear_qkv"
LINEAR_OUT = "self_attention.linear_proj"
ZERO_OUT_BIAS = "self_attention.linear_proj.zero_bias"  # no key of Megatron's: see CONSTANTS
IN_PROJ    = "self_attention.in_proj"
OUT_NORM   = "self_attention.out_norm.weight"
SINKS      = "self_attention.core_attention.softmax_offset"
Q_NORM     = "self_attention.q_layernorm"
K_NORM     = "self_attention.k_layernorm"
MLP_NORM   = "mlp.linear_fc1.layer_norm"
FC1        = "mlp.linear_fc1"
FC2        = "mlp.linear_fc2"
MOE_NORM   = "pre_mlp_layernorm"
ROUTER     = "mlp.router.weight"
ROUTER_BIAS = "mlp.router.expert_bias"
ROUTER_LINEAR_BIAS = "mlp.router.bias"
EXPERT_FC1 = "mlp.experts.linear_fc1.weight{e}"
EXPERT_FC2 = "mlp.experts.linear_fc2.weight{e}"
EXPERT_FC1_BIAS = "mlp.experts.linear_fc1.bias{e}"
EXPERT_FC2_BIAS = "mlp.experts.linear_fc2.bias{e}"
SHARED_FC1 = "mlp.shared_experts.linear_fc1.weight"
SHARED_FC2 = "mlp.shared_experts.linear_fc2.weight"
SHARED_GATE = "mlp.shared_experts.gate_weight"
# fmt: on


def embedding(
    name: str, head: str, *, tied: bool, aliases: tuple[str, ...] = (), head_aliases: tuple[str, ...] = ()
) -> tuple[Rule, ...]:
    """Input embedding and head. Tied: one component, which may also be on disk under the head's name.

    `aliases` and `head_aliases` are further names of the two (multi-token-prediction layers repeat them).
    """
    if tied:
        return (rule(name, VOCAB, EMBEDDING, "v", copies=(head,), tied_copy=OUTPUT, aliases=(*aliases, *head_aliases)),)
    return (rule(name, VOCAB, EMBEDDING, "v", aliases=aliases), rule(head, VOCAB, OUTPUT, "v", aliases=head_aliases))


def scaled_embedding(name: str, head: str, folded: Folded) -> tuple[Rule, ...]:
    """Input embedding, which the model multiplies by a factor, and head; in Megatron always two tensors.

    Tied: the head is the tensor as it is, so that it goes back unchanged, and the embedding is derived from it.
    """
    scale = Affine(folded.embedding, inverse=folded.tied, rounded=folded.rounded)
    if folded.tied:
        return (rule(name, VOCAB, OUTPUT, "v", copies=(head,), derived=((EMBEDDING, scale),)),)
    return (rule(name, VOCAB, EMBEDDING, "v", codecs=(scale,)), rule(head, VOCAB, OUTPUT, "v"))


def with_codec(rules: Iterable[Rule], codec: Codec, *keys: str) -> tuple[Rule, ...]:
    """The rules, those whose Megatron key ends in one of `keys` with a codec on each Hugging Face tensor."""
    return tuple(replace(one, codecs=(codec,) * len(one.hf)) if one.megatron.endswith(keys) else one for one in rules)


def layers(
    prefix: str,
    rows: Iterable[Row],
    within: tuple[int, ...] | None = None,
    inner: str = "decoder.layers.{l}.",
    *,
    latent: bool = False,
) -> tuple[Rule, ...]:
    """Per-layer rules; names are relative to `prefix` on the left and to `inner` on the right. `within`: which layers.

    A norm that Transformer Engine fuses into a linear in some layers and not in others has the other spelling as its
    second torch_dist key: the local spec of megatron-core (to 0.19) maps all of them to the fused one, but with latent
    attention (`latent`) none of them (gpt_layer_specs.py).
    """
    found = []
    dist_aliases = LATENT_DIST_ALIASES if latent else DIST_ALIASES
    for hf, equation, megatron, tp in rows:
        names = (hf,) if isinstance(hf, str) else hf
        options: dict[str, Any] = {"layers": within}
        if megatron in dist_aliases:
            options["dist_aliases"] = (inner + dist_aliases[megatron],)
        if megatron in DIST_PARTS:
            options["dist_parts"] = DIST_PARTS[megatron]
        if megatron in LOCAL_TP:
            options["tp_local"] = LOCAL_TP[megatron]
        if megatron in CONSTANTS:
            options["constants"] = (CONSTANTS[megatron],) * len(names)
        if megatron == ROUTER_BIAS:
            options["keep_dtype"] = True  # megatron-core keeps it in fp32 in every model (moe/router.py)
        found.append(rule([prefix + name for name in names], equation, inner + megatron, tp, **options))
    return tuple(found)


# what Hugging Face models may have and Megatron has no tensor for: it must be this number everywhere
CONSTANTS = {ZERO_OUT_BIAS: 0.0}
DIST_ALIASES = {MOE_NORM + ".weight": MLP_NORM + "_weight", MOE_NORM + ".bias": MLP_NORM + "_bias"}
LATENT_DIST_ALIASES = {
    MLP_NORM + "_weight": MOE_NORM + ".weight",
    MLP_NORM + "_bias": MOE_NORM + ".bias",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
# the local spec column-splits the down projections, Transformer Engine's has them whole (gpt_layer_specs.py, 0.14 on)
LOCAL_TP = {"self_attention.linear_q_down_proj.weight": "y", "self_attention.linear_kv_down_proj.weight": "j"}


def attention(a: Architecture) -> list[Row]:
    """Grouped-query attention under Llama's names, with the norm before it."""
    # fmt: off
    table: list[Row] = [
        ("input_layernorm.weight",                                    HIDDEN,   INPUT_NORM + "_weight", None),
        (("self_attn.q_proj.weight", "self_attn.k_proj.weight",
          "self_attn.v_proj.weight"), GATED_QKV if a.output_gate else QKV,      LINEAR_QKV + ".weight", "g"),
        ("self_attn.o_proj.weight",                                   OUT,      LINEAR_OUT + ".weight", "g"),
    ]
    if a.qkv_bias or a.linear_bias:
        table += [(("self_attn.q_proj.bias", "self_attn.k_proj.bias",
                    "self_attn.v_proj.bias"),                         QKV_BIAS, LINEAR_QKV + ".bias",   "g")]
    if a.linear_bias or a.out_bias:
        table += [("self_attn.o_proj.bias",                           HIDDEN,   LINEAR_OUT + ".bias",   None)]
    if a.zero_out_bias:
        table += [("self_attn.o_proj.bias",                           HIDDEN,   ZERO_OUT_BIAS,          None)]
    if a.qk_norm:
        q, k = ("(g q d) -> (g q d)", "(g d) -> (g d)") if a.qk_norm_whole else (HEAD, HEAD)
        table += [("self_attn.q_norm.weight",                         q,        Q_NORM + ".weight",     None),
                  ("self_attn.k_norm.weight",                         k,        K_NORM + ".weight",     None)]
    if a.sinks:
        table += [("self_attn.sinks",                                 "(g q) -> (g q)", SINKS,          "g")]
    if a.norm == "layer":
        table += [("input_layernorm.bias",                            HIDDEN,   INPUT_NORM + "_bias",   None)]
    # fmt: on
    return table


# what in_proj and conv1d consist of; megatron-core keeps each part as a tensor of its own (0.16.1 ssm/gated_delta_net.py)
DIST_PARTS = {
    IN_PROJ + ".weight": ("query", "key", "value", "z", "beta", "alpha"),
    "self_attention.conv1d.weight": ("query", "key", "value"),
}


def linear_attention(in_proj: Row) -> list[Row]:
    """Gated delta net under Qwen3-Next's names, with the norm before it; `in_proj` is the row of its projections."""
    at = "self_attention."
    # fmt: off
    return [
        ("input_layernorm.weight",    HIDDEN,                             IN_PROJ + ".layer_norm_weight", None),
        in_proj,
        ("linear_attn.conv1d.weight", "(t a + t a + t r b) 1 c -> (t a + t a + t r b) 1 c", at + "conv1d.weight", "t"),
        ("linear_attn.A_log",         "(t r) -> (t r)",                   at + "A_log",           "t"),
        ("linear_attn.dt_bias",       "(t r) -> (t r)",                   at + "dt_bias",         "t"),
        ("linear_attn.norm.weight",   "b -> b",                           OUT_NORM,               None),
        ("linear_attn.out_proj.weight", "h (t r b) -> h (t r b)",         at + "out_proj.weight", "t"),
    ]
    # fmt: on


IN_PROJ_GROUPED: Row = (  # per key head: its query, key, values and gates; then its betas and alphas
    ("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"),
    "(t (a + a + r b + r b)) h, (t (r + r)) h -> (t a + t a + t r b + t r b + t r + t r) h",
    IN_PROJ + ".weight",
    "t",
)


def latent_attention(a: Architecture) -> list[Row]:
    """Multi-latent attention under DeepSeek's names; rope rows keep their order (megatron-core de-interleaves them)."""
    assert a.mla is not None
    at = "self_attention."
    # fmt: off
    table: list[Row] = [
        ("input_layernorm.weight",                  HIDDEN,             "input_layernorm.weight",                     None),
        ("self_attn.kv_a_proj_with_mqa.weight",     "j h -> j h",       at + "linear_kv_down_proj.weight",            None),
        ("self_attn.kv_b_proj.weight",              "(n u) z -> (n u) z", at + "linear_kv_up_proj.weight",            "n"),
        ("self_attn.o_proj.weight",                 "h (n w) -> h (n w)", at + "linear_proj.weight",                  "n"),
    ]
    if a.mla.query_rank is None:
        table += [("self_attn.q_proj.weight",       "(n k) h -> (n k) h", at + "linear_q_proj.weight",                "n")]
    else:
        table += [("self_attn.q_a_proj.weight",     "y h -> y h",       at + "linear_q_down_proj.weight",             None),
                  ("self_attn.q_b_proj.weight",     "(n k) y -> (n k) y", at + "linear_q_up_proj.weight",             "n")]
    if a.qk_norm:
        table += [("self_attn.kv_a_layernorm.weight", "z -> z",         at + "linear_kv_up_proj.layer_norm_weight",   None)]
        if a.mla.query_rank is not None:
            table += [("self_attn.q_a_layernorm.weight", "y -> y",      at + "linear_q_up_proj.layer_norm_weight",    None)]
    if a.mla.query_norm:  # no Hugging Face model has it: the name on the left is never written
        table += [("self_attn.q_proj.layer_norm.weight", HIDDEN,        at + "linear_q_proj.layer_norm_weight",       None)]
    # fmt: on
    return table


def mlp(a: Architecture) -> list[Row]:
    """The dense MLP under Llama's names, with the norm before it."""
    # fmt: off
    table: list[Row] = [
        ("post_attention_layernorm.weight",                           HIDDEN,   MLP_NORM + "_weight",   None),
        ("mlp.down_proj.weight",                                      DOWN,     FC2 + ".weight",        "f"),
    ]
    if a.gated:
        table += [(("mlp.gate_proj.weight", "mlp.up_proj.weight"),    GLU,      FC1 + ".weight",        "f")]
    else:
        table += [("mlp.up_proj.weight",                              UP,       FC1 + ".weight",        "f")]
    if a.linear_bias:
        table += [("mlp.down_proj.bias",                              HIDDEN,   FC2 + ".bias",          None)]
        if a.gated:
            table += [(("mlp.gate_proj.bias", "mlp.up_proj.bias"),    GLU_BIAS, FC1 + ".bias",          "f")]
        else:
            table += [("mlp.up_proj.bias",                            "f -> f", FC1 + ".bias",          "f")]
    if a.norm == "layer":
        table += [("post_attention_layernorm.bias",                   HIDDEN,   MLP_NORM + "_bias",     None)]
    # fmt: on
    return table


def experts(
    a: Architecture, router: str = "mlp.gate", expert: str = "mlp.experts.{e}.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), shared: str = "mlp.shared_experts.",
    bias: str = "mlp.gate.e_score_correction_bias", shared_gate: str = "mlp.shared_expert_gate.weight",
) -> list[Row]:  # fmt: skip
    """Router, experts and shared expert of an expert layer, with the norm before it. `names`: gate, up, down."""
    assert a.moe is not None
    gate, up, down = (name + ".weight" for name in names)
    # fmt: off
    table: list[Row] = [
        ("post_attention_layernorm.weight",        HIDDEN,               MOE_NORM + ".weight", None),
        (router + ".weight",                       "e h -> e h",         ROUTER,               None),
        ((expert + gate, expert + up),             "x h, x h -> (x + x) h", EXPERT_FC1,        "x"),
        (expert + down,                            "h x -> h x",         EXPERT_FC2,           "x"),
    ]
    if a.linear_bias:
        gate, up, down = (name + ".bias" for name in names)
        table += [(router + ".bias",               "e -> e",             ROUTER_LINEAR_BIAS,   None),
                  ((expert + gate, expert + up),   "x, x -> (x + x)",    EXPERT_FC1_BIAS,      "x"),
                  (expert + down,                  HIDDEN,               EXPERT_FC2_BIAS,      None)]
    if a.moe.expert_bias:
        table += [(bias,                           "e -> e",             ROUTER_BIAS,          None)]
    if a.moe.shared_ffn_size:
        table += [((shared + "gate_proj.weight", shared + "up_proj.weight"),
                                                   "s h, s h -> (s + s) h", SHARED_FC1,        "s"),
                  (shared + "down_proj.weight",    "h s -> h s",         SHARED_FC2,           "s")]
    if a.moe.shared_gate:
        table += [(shared_gate,                    "1 h -> 1 h",         SHARED_GATE,          None)]
    # fmt: on
    return table


def decoder(
    a: Architecture, moe_rows: list[Row], prefix: str = "model.layers.{l}.", in_proj: Row = IN_PROJ_GROUPED
) -> tuple[Rule, ...]:
    """All layers: attention of either kind, dense MLPs and experts in their own layers."""
    dense = tuple(layer for layer in range(a.num_layers) if layer not in set(a.moe_layers))
    latent = a.mla is not None
    full = tuple(layer for layer in range(a.num_layers) if layer not in set(a.linear_layers))
    found = layers(
        prefix, latent_attention(a) if latent else attention(a), full if a.linear_layers else None, latent=latent
    )
    if a.linear_layers:
        found += layers(prefix, linear_attention(in_proj), a.linear_layers)
    if dense:
        found += layers(prefix, mlp(a), dense if a.moe else None, latent=latent)
    if a.moe:
        found += layers(prefix, moe_rows, a.moe_layers if dense else None, latent=latent)
    return found


def multi_token_prediction(
    a: Architecture, moe_rows: list[Row], prefix: str = "model.layers.{m}.", table: list[Row] | None = None
) -> tuple[Rule, ...]:
    """MTP layers, expert layers where the model has experts. `table` is what surrounds them (None: DeepSeek's)."""
    if not a.mtp_layers:
        return ()
    outer = "mtp.layers.{m}."
    # fmt: off
    table = table or [
        ("enorm.weight",            HIDDEN,       "enorm.weight",           None),
        ("hnorm.weight",            HIDDEN,       "hnorm.weight",           None),
        ("eh_proj.weight",          MTP_INPUT,    "eh_proj.weight",         "o"),
        ("shared_head.norm.weight", HIDDEN,       "final_layernorm.weight", None),
    ]
    # fmt: on
    inner, latent = outer + "transformer_layer.", a.mla is not None
    found = layers(prefix, table, inner=outer)
    found += layers(prefix, latent_attention(a) if latent else attention(a), inner=inner, latent=latent)
    return found + layers(prefix, moe_rows if a.moe else mlp(a), inner=inner, latent=latent)


def stored_centred(rules: Iterable[Rule], but: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """Rules of a family that stores its norms as gamma - 1; `but` are the Megatron keys' endings of those that it does not."""
    return tuple(
        replace(item, codecs=(CENTRED,)) if item.gamma and not (but and item.megatron.endswith(but)) else item
        for item in rules
    )


def standard(a: Architecture, moe_rows: list[Row] | None = None) -> tuple[Rule, ...]:
    """The layout of Llama's keys (DeepSeek's for latent attention, experts and MTP), with a row for everything that an
    Architecture can have.

    `moe_rows` are the expert layers' rows where they have other names. Llama, Mistral, Qwen2 and Qwen3 are exactly this
    with their switches; a Megatron checkpoint without a Hugging Face family (resharding) uses it for its Megatron side.
    """
    rows = (experts(a) if a.moe else []) if moe_rows is None else moe_rows
    at = "model.layers.{m}."
    rules = [
        *embedding(
            "model.embed_tokens.weight",
            "lm_head.weight",
            tied=a.tied,
            aliases=(at + "embed_tokens.weight",) if a.mtp_layers else (),
            head_aliases=(at + "shared_head.head.weight",) if a.mtp_layers else (),
        ),
        *decoder(a, rows),
        *multi_token_prediction(a, rows),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    ]
    if a.norm == "layer":
        rules.append(rule("model.norm.bias", HIDDEN, FINAL_NORM + ".bias"))
    if a.rope is None:
        positions = SPARE_POSITION if a.spare_positions else POSITION
        rules.append(rule("model.embed_positions.weight", positions, POSITIONS))
    return tuple(replace(item, mtp_start=a.num_layers) for item in rules)  # MTP layers are numbered on


def axis_sizes(a: Architecture) -> dict[str, int]:
    """The size of every axis."""
    sizes = {
        "l": a.num_layers,
        "v": a.vocab_size,
        "p": a.max_positions,
        "spare": a.spare_positions,
        "h": a.hidden_size,
        "g": a.num_query_groups,
        "q": a.num_heads // a.num_query_groups,
        "d": a.head_dim,
        "f": a.ffn_size,
        "m": a.mtp_layers,
        "o": a.hidden_size,
        "token": a.hidden_size,
        "state": a.hidden_size,
        "n": a.num_heads,
    }
    if a.moe:
        sizes |= {"e": a.moe.num_experts, "x": a.moe.ffn_size, "s": a.moe.shared_ffn_size}
    if a.mla:
        sizes |= {
            "k": a.mla.nope_dim + a.mla.rope_dim,
            "u": a.mla.nope_dim + a.mla.value_dim,
            "w": a.mla.value_dim,
            "y": a.mla.query_rank or 0,
            "z": a.mla.key_value_rank,
            "j": a.mla.key_value_rank + a.mla.rope_dim,
        }
    if a.linear:
        sizes |= {
            "t": a.linear.key_heads,
            "r": a.linear.value_heads // a.linear.key_heads,
            "a": a.linear.key_dim,
            "b": a.linear.value_dim,
            "c": a.linear.kernel,
        }
    return sizes
