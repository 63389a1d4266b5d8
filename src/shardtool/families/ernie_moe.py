"""ERNIE-4.5 with experts: rope on neighbouring dims, shared experts, a softmax router whose choice a bias shifts.

megatron-core knows that bias with sigmoid scores only: the weights convert, the function is another one
(families.exactness).
"""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture, MixtureOfExperts
from shardtool.families.blocks import ROUTER_BIAS, Row, experts
from shardtool.families.blocks import standard as standard_rules
from shardtool.families.dialects import ERNIE
from shardtool.families.family import Config, Family
from shardtool.families.rope import read_rope, rope_refusal
from shardtool.layout.rules import Rule


def _rules(a: Architecture) -> tuple[Rule, ...]:
    bias = "mlp.moe_statics.e_score_correction_bias"
    rows: list[Row] = [(bias, "1 e -> e", key, tp) if key == ROUTER_BIAS else (hf, equation, key, tp)
                       for hf, equation, key, tp in experts(a)]  # fmt: skip
    return standard_rules(a, rows)


def _derived(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    def get(key: str, default: int) -> int:
        value = config.get(key)
        return default if value is None else value

    count, step = values["num_layers"], get("moe_layer_interval", 1)
    last = get("moe_layer_end_index", -1)
    inside = range(get("moe_layer_start_index", 1), (count - 1 if last == -1 else last) + 1)
    size = get("moe_intermediate_size", 1536)
    moe = MixtureOfExperts(
        num_experts=get("moe_num_experts", 64),
        top_k=get("moe_k", 6),
        ffn_size=size,
        layers=tuple(layer for layer in range(count) if layer in inside and (layer + 1) % step == 0),
        expert_bias=True,
        shared_ffn_size=size * get("moe_num_shared_experts", 2),
    )
    return standard.derived(groups=4)(config, values) | {
        "rope": read_rope(config, theta=500000.0, interleaved=True), "moe": moe,
    }  # fmt: skip


def _extra(a: Architecture) -> dict[str, Any]:
    moe = a.moe
    assert moe is not None
    first, last = min(moe.layers, default=0), max(moe.layers, default=0)
    step = moe.layers[1] - first if len(moe.layers) > 1 else 1
    return standard.extra(a) | {
        "use_bias": False, "moe_num_experts": moe.num_experts, "moe_k": moe.top_k,
        "moe_intermediate_size": moe.ffn_size, "moe_num_shared_experts": moe.shared_ffn_size // moe.ffn_size,
        "moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": step,
    }  # fmt: skip


def _refuse(config: Config) -> str | None:
    if config.get("use_bias"):
        return "use_bias: its router has no bias where all linears have one, megatron-core's has"
    return rope_refusal(config, interleaved=True)


FAMILY = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    standard.table(
        vocab_size=103424, hidden_size=2560, intermediate_size=12288, num_hidden_layers=28, num_attention_heads=20,
        max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    _rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived,
    extra=_extra,
    refuse=_refuse,
    ignored=standard.ROTARY_BUFFERS,
    dialects=ERNIE,
)  # fmt: skip
