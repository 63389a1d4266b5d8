"""Families with Llama's keys and a switch or two of their own: Seed-OSS, SmolLM3, ERNIE-4.5 dense, StableLM."""

from __future__ import annotations

from typing import Any

from shardtool.families import standard_config as standard
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import standard as rules
from shardtool.families.family import Config, Family, Field
from shardtool.families.rope import read_rope, rope_refusal

# --- Seed-OSS: QKV bias, a head dim of its own -----------------------------------------------------------------------


def _derived_seed(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(head_dim=128, groups=8)(config, values) | {"qkv_bias": config.get("attention_bias", True)}


def _refuse_seed(config: Config) -> str | None:
    if config.get("attention_out_bias") or config.get("mlp_bias"):
        return "attention_out_bias or mlp_bias: megatron-core has biases on all linears, or on qkv alone"
    return rope_refusal(config)


SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    standard.table(
        vocab_size=155136, hidden_size=4096, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=80,
        max_position_embeddings=524288, attention_dropout=0.1,
    ),
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived_seed,
    extra=lambda a: standard.extra(a) | {"attention_bias": a.qkv_bias, "attention_out_bias": False, "mlp_bias": False},
    refuse=_refuse_seed,
    ignored=standard.ROTARY_BUFFERS,
)  # fmt: skip


# --- SmolLM3: every fourth layer without rope ------------------------------------------------------------------------


def _derived_smol(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    count, step = values["num_layers"], config.get("no_rope_layer_interval", 4)
    # the list says 1 for layers that use rope
    uses = config.get("no_rope_layers") or [int((layer + 1) % step != 0) for layer in range(count)]
    return standard.derived(groups=4, theta=2e6)(config, values) | {
        "no_rope_layers": tuple(layer for layer, flag in enumerate(uses) if not flag),
    }


def _extra_smol(a: Architecture) -> dict[str, Any]:
    return standard.extra(a) | {
        "no_rope_layers": [int(layer not in a.no_rope_layers) for layer in range(a.num_layers)],
        "use_sliding_window": False, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip


def _refuse_smol(config: Config) -> str | None:
    if config.get("use_sliding_window"):
        return "use_sliding_window: some layers have a sliding window and others not"
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "attention_bias or mlp_bias is not known in this family"
    return rope_refusal(config)


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    standard.table(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived_smol,
    extra=_extra_smol,
    refuse=_refuse_smol,
    ignored=standard.ROTARY_BUFFERS,
)  # fmt: skip


# --- ERNIE-4.5 dense: rope on interleaved pairs ----------------------------------------------------------------------


def _derived_ernie(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(head_dim=128, groups=2)(config, values) | {
        "rope": read_rope(config, theta=500000.0, interleaved=True),
        "linear_bias": bool(config.get("use_bias")),
    }


ERNIE = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    standard.table(
        vocab_size=103424, hidden_size=1024, intermediate_size=3072, num_hidden_layers=18, num_attention_heads=16,
        max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    rules,
    fixed={"norm": "rms", "gated": True},
    derived=_derived_ernie,
    extra=lambda a: standard.extra(a) | {"use_bias": a.linear_bias},
    refuse=lambda config: rope_refusal(config, interleaved=True),
    ignored=standard.ROTARY_BUFFERS,
)  # fmt: skip


# --- StableLM: LayerNorm with bias, rope on a quarter of each head ---------------------------------------------------


def _derived_stable(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return standard.derived(groups=32, fraction=0.25)(config, values) | {"qkv_bias": bool(config.get("use_qkv_bias"))}


def _refuse_stable(config: Config) -> str | None:
    if config.get("use_parallel_residual"):
        return "use_parallel_residual: attention and MLP read the same input, megatron-core has no such layer"
    if config.get("qk_layernorm"):
        return "qk_layernorm: a norm of its own for every head; megatron-core has one for all heads"
    return rope_refusal(config, partial=True)


STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    (
        *(
            field
            for field in standard.table(
                vocab_size=50304, hidden_size=2560, intermediate_size=6912, max_position_embeddings=4096
            )
            if field.name != "norm_eps"
        ),
        Field("norm_eps", "layer_norm_eps", 1e-5, float),
        Field("hidden_dropout", "hidden_dropout", 0.0, float),
    ),
    rules,
    fixed={"norm": "layer", "gated": True},
    derived=_derived_stable,
    extra=lambda a: (
        standard.extra(a) | {"use_qkv_bias": a.qkv_bias, "qk_layernorm": False, "use_parallel_residual": False}
    ),
    refuse=_refuse_stable,
    ignored=standard.ROTARY_BUFFERS,
)
