"""InternLM2 (remote code): wqkv is stored query group by query group already; w1 gate, w3 up, w2 down."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
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
    Row,
    embedding,
    layers,
)  # fmt: skip
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal
from shardtool.layout.rules import Rule, rule

# fmt: off
LAYER: list[Row] = [
    ("attention_norm.weight",                                HIDDEN, INPUT_NORM + "_weight", None),
    ("attention.wqkv.weight", "(g (q d + d + d)) h -> (g (q d + d + d)) h", LINEAR_QKV + ".weight", "g"),
    ("attention.wo.weight",                                  OUT,    LINEAR_OUT + ".weight", "g"),
    ("ffn_norm.weight",                                      HIDDEN, MLP_NORM + "_weight",   None),
    (("feed_forward.w1.weight", "feed_forward.w3.weight"),   GLU,    FC1 + ".weight",        "f"),
    ("feed_forward.w2.weight",                               DOWN,   FC2 + ".weight",        "f"),
]
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    return (
        *embedding("model.tok_embeddings.weight", "output.weight", tied=a.tied),
        *layers("model.layers.{l}.", LAYER),
        rule("model.norm.weight", HIDDEN, FINAL_NORM + ".weight"),
    )


def _without_dynamic(config: Config) -> Config:
    """Dynamic NTK changes the frequencies only beyond max_position_embeddings, which is as far as the model converts."""
    scaling = config.get("rope_scaling") or {}
    return {**config, "rope_scaling": None} if scaling.get("type", scaling.get("rope_type")) == "dynamic" else config


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    # its code has no head_dim of its own
    return standard.derived()({**_without_dynamic(config), "head_dim": None}, values)


def _refuse(config: Config) -> str | None:
    if config.get("bias"):
        return "bias puts biases on wqkv and wo but not on the MLP; megatron-core cannot"
    return rope_refusal(_without_dynamic(config))


def _limit(config: Config) -> str | None:
    dynamic = config.get("rope_scaling") != _without_dynamic(config).get("rope_scaling")
    return "dynamic NTK sets in beyond max_position_embeddings" if dynamic else None


FAMILY = Family(
    "internlm2",
    "InternLM2ForCausalLM",
    standard.table(vocab_size=103168),
    _rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=lambda a: standard.extra(a) | {"bias": False},
    refuse=_refuse,
    own_rope=True,
    limit=_limit,
    ignored=(r"model\.layers\.\d+\.attention\.rotary_emb\.inv_freq",),
)
