"""MiniCPM 1, 2 and 4 (remote code): Llama with three factors, which Megatron's weights contain as Granite's.

The embedded tokens are multiplied by scale_emb, what attention and MLP add by scale_depth / sqrt(layers), and what the
head reads is divided by hidden_size / dim_model_base.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from shardtool.families import granite
from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, Folded
from shardtool.families.family import Config, Family
from shardtool.families.rope import rope_refusal


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    hidden, layers = values["hidden_size"], values["num_layers"]
    scale = float(config.get("scale_emb", 1))
    tied = bool(config.get("tie_word_embeddings", True))
    apart = tied and scale != 1
    folded = Folded(
        scale,
        residual=float(config.get("scale_depth", 1)) / sqrt(layers),
        logits_divisor=hidden / config.get("dim_model_base", 1),
        tied=apart,
    )
    found = standard.derived()({**config, "head_dim": None}, values)
    return found | {"tied": tied and not apart, "folded": None if folded == Folded() else folded}


def _extra(a: Architecture) -> dict[str, Any]:
    folded = a.folded or Folded()
    return {key: value for key, value in standard.extra(a).items() if key != "head_dim"} | {
        "tie_word_embeddings": a.tied or folded.tied,
        "scale_emb": folded.embedding,
        "scale_depth": folded.residual * sqrt(a.num_layers),
        "dim_model_base": a.hidden_size / folded.logits_divisor,
    }


def _refuse(config: Config) -> str | None:
    if config.get("num_experts"):
        return "it has experts, which this table has not"
    if config.get("attention_bias"):
        return "attention_bias: a bias on q, k, v and o without one in the MLP; megatron-core has all or qkv alone"
    if (config.get("rope_scaling") or {}).get("type") == "yarn":
        return "rope type 'yarn': this family's code knows none"
    return rope_refusal(config)


FAMILY = Family(
    "minicpm",
    "MiniCPMForCausalLM",
    granite.TABLE,
    granite.rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    caveats=granite.caveats,
    own_rope=True,
)
