"""MiMo-7B: Qwen2 with multi-token-prediction layers of its own names, whose projection takes the state first."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from shardtool.families import qwen2
from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import HIDDEN, Row, multi_token_prediction
from shardtool.families.blocks import standard as standard_rules
from shardtool.families.family import Config, Family
from shardtool.layout.rules import Rule

# fmt: off
MTP: list[Row] = [
    ("token_layernorm.weight",  HIDDEN,                                      "enorm.weight",           None),
    ("hidden_layernorm.weight", HIDDEN,                                      "hnorm.weight",           None),
    ("input_proj.weight",       "o (state + token) -> o (token + state)",    "eh_proj.weight",         "o"),
    ("final_layernorm.weight",  HIDDEN,                                      "final_layernorm.weight", None),
]
# fmt: on


def _rules(a: Architecture) -> tuple[Rule, ...]:
    main = standard_rules(replace(a, mtp_layers=0))
    return (*main, *multi_token_prediction(a, [], "model.mtp_layers.{m}.", MTP))


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return qwen2.FAMILY.derived(config, values) | {"mtp_layers": config.get("num_nextn_predict_layers", 0) or 0}


def _extra(a: Architecture) -> dict[str, Any]:
    return qwen2.FAMILY.extra(a) | {"num_nextn_predict_layers": a.mtp_layers}


def _refuse(config: Config) -> str | None:
    if standard.windows(config)["window_layers"] is not None:
        return "some layers have a sliding window and others not, and no code says which kind its prediction layers are"
    return None


FAMILY = Family(
    "mimo",
    "MiMoForCausalLM",
    qwen2.FAMILY.table,  # its configuration class is Qwen2's with one key more
    _rules,
    fixed={"norm": "rms", "gated": True, "qkv_bias": True},
    derived=_derived,
    extra=_extra,
    refuse=lambda config: qwen2.FAMILY.refuse(config) or _refuse(config),
    ignored=standard.ROTARY_BUFFERS,
    mtp_prefix="model.mtp_layers.0.",
)
