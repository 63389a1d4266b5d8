"""Granite 3 and its experts: Llama and Mixtral with four factors.

`attention_multiplier` is megatron-core's softmax_scale. The others are in Megatron's weights: embedding_multiplier in
the embedding, residual_multiplier in the last linears of attention and MLP, logits_scaling in the gain of the final
norm. There it leaves the head as it is stored, so that a tied embedding comes back unchanged whatever the factors are.
"""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, Folded, MixtureOfExperts
from shardtool.families.blocks import (
    EXPERT_FC1,
    EXPERT_FC2,
    FC2,
    FINAL_NORM,
    HIDDEN,
    LINEAR_OUT,
    MOE_NORM,
    ROUTER,
    Row,
    decoder,
    embedding,
    scaled_embedding,
    with_codec,
)  # fmt: skip
from shardtool.families.dialects import GRANITE as GRANITE_DIALECTS
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal
from shardtool.layout.codecs import Affine
from shardtool.layout.rules import Rule, rule

# fmt: off
EXPERTS: list[Row] = [
    ("post_attention_layernorm.weight",         HIDDEN,                     MOE_NORM + ".weight", None),
    ("block_sparse_moe.router.layer.weight",    "e h -> e h",               ROUTER,               None),
    ("block_sparse_moe.input_linear.weight",    "e (x + x) h -> e (x + x) h", EXPERT_FC1,         "x"),
    ("block_sparse_moe.output_linear.weight",   "e h x -> e h x",           EXPERT_FC2,           "x"),
]
# fmt: on


def rules(a: Architecture) -> tuple[Rule, ...]:
    """Llama's names, with the factors as codecs."""
    folded = a.folded or Folded()
    names = ("model.embed_tokens.weight", "lm_head.weight")
    ends = scaled_embedding(*names, folded) if folded.embedding != 1 else embedding(*names, tied=a.tied)
    found: tuple[Rule, ...] = (
        *ends,
        *decoder(a, EXPERTS),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    )
    if folded.residual != 1:
        last = (LINEAR_OUT, FC2)
        keys = [f"{linear}.{kind}" for linear in last for kind in ("weight", "bias")]
        found = with_codec(found, Affine(folded.residual), *keys, EXPERT_FC2)
    if folded.logits_divisor != 1:
        found = with_codec(found, Affine(folded.logits_divisor, inverse=True), FINAL_NORM + ".weight")
    return found


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    found = standard.derived()(config, values)
    names = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
    scale, residual, divisor, softmax = (1.0 if (x := config.get(name)) is None else float(x) for name in names)
    tied = bool(config.get("tie_word_embeddings", False))
    apart = tied and scale != 1
    folded = Folded(scale, residual=residual, logits_divisor=divisor, tied=apart)
    return found | {
        "tied": tied and not apart,
        "folded": None if folded == Folded() else folded,
        "softmax_scale": None if softmax == found["head_dim"] ** -0.5 else softmax,
        "linear_bias": bool(config.get("attention_bias")),
    }


def _extra(a: Architecture) -> dict[str, Any]:
    folded = a.folded or Folded()
    return standard.extra(a) | {
        "tie_word_embeddings": a.tied or folded.tied,
        "embedding_multiplier": folded.embedding,
        "residual_multiplier": folded.residual,
        "logits_scaling": folded.logits_divisor,
        "attention_multiplier": a.head_dim**-0.5 if a.softmax_scale is None else a.softmax_scale,
        "attention_bias": a.linear_bias,
        "mlp_bias": a.linear_bias,
    }


def _refuse(config: Config) -> str | None:
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        return "attention_bias and mlp_bias differ; megatron-core has biases on all linears, or on qkv alone"
    if 0.0 in [config.get(name) for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")]:
        return "a multiplier of 0: no weight can contain it and come back"
    return rope_refusal(config)


def caveats(a: Architecture) -> tuple[str, ...]:
    """What the factors mean for a checkpoint in Megatron."""
    if a.folded is None:
        return ()
    notes = [
        "the weights contain the model's embedding, residual and logits factors, each product rounded once: in bf16 and "
        "fp16 they come back within one rounding (factors that are powers of two, and everything by way of "
        "--dtype fp32, bit-identical); compare such a checkpoint with `verify --dtype native`"
    ]
    if a.folded.tied:
        notes.append("embedding and head, one tensor in Hugging Face, are two in Megatron: training moves them apart")
    return tuple(notes)


TABLE = tuple(field for field in standard.table() if field.name != "tied")

GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    TABLE,
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    caveats=caveats,
)


# --- experts ---------------------------------------------------------------------------------------------------------


def _derived_moe(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    count, top_k = config.get("num_local_experts"), config.get("num_experts_per_tok")
    layers = tuple(range(values["num_layers"]))
    # the softmax is taken over the chosen experts
    moe = MixtureOfExperts(8 if count is None else count, 2 if top_k is None else top_k, values["ffn_size"], layers)
    return _derived(config, values) | {"moe": moe}


def _extra_moe(a: Architecture) -> dict[str, Any]:
    found = {key: value for key, value in _extra(a).items() if key != "mlp_bias"}
    if a.moe is None:
        return found
    return found | {
        "num_local_experts": a.moe.num_experts,
        "num_experts_per_tok": a.moe.top_k,
        "intermediate_size": a.moe.ffn_size,
    }


GRANITE_MOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    TABLE,
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived_moe,
    extra=_extra_moe,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    caveats=caveats,
    dialects=GRANITE_DIALECTS,
)
