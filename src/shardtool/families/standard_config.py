"""The config table that Llama and its relatives share: the same keys, other defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardtool.families.architecture import Architecture
from shardtool.families.family import Config, Field
from shardtool.families.rope import read_rope, write_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
ACTIVATION_NAMES = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip

# inv_freq is computed, never trained; old files carry it
ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")


def table(**defaults: Any) -> tuple[Field, ...]:
    """The table, with the defaults of the family's configuration class in transformers 5."""

    def default(key: str, otherwise: Any) -> Any:
        return defaults.get(key, otherwise)

    # fmt: off
    return (
        Field("num_layers",        "num_hidden_layers",       default("num_hidden_layers", 32)),
        Field("hidden_size",       "hidden_size",             default("hidden_size", 4096)),
        Field("num_heads",         "num_attention_heads",     default("num_attention_heads", 32)),
        Field("ffn_size",          "intermediate_size",       default("intermediate_size", 11008)),
        Field("vocab_size",        "vocab_size",              default("vocab_size", 32000)),
        Field("max_positions",     "max_position_embeddings", default("max_position_embeddings", 2048)),
        Field("norm_eps",          "rms_norm_eps",            default("rms_norm_eps", 1e-6), float),
        Field("tied",              "tie_word_embeddings",     default("tie_word_embeddings", False), bool),
        Field("activation",        "hidden_act",              default("hidden_act", "silu"),
              ACTIVATIONS.__getitem__, ACTIVATION_NAMES.__getitem__),
        Field("attention_dropout", "attention_dropout",       default("attention_dropout", 0.0), float),
    )
    # fmt: on


def derived(
    head_dim: int | None = None, groups: int | None = None, theta: float = 10000.0, fraction: float | None = None
) -> Callable[[Config, dict[str, Any]], dict[str, Any]]:
    """Query groups, head dim and rope: the arguments are the class's own defaults where config.json has none."""

    def derive(config: Config, values: dict[str, Any]) -> dict[str, Any]:
        heads = values["num_heads"]
        absent = groups if "num_key_value_heads" not in config and groups is not None else heads
        dim = config.get("head_dim", head_dim) or values["hidden_size"] // heads
        return {
            "num_query_groups": config.get("num_key_value_heads") or absent,
            "head_dim": dim,
            "rope": read_rope(config, theta=theta, fraction=fraction),
        }

    return derive


def extra(a: Architecture) -> dict[str, Any]:
    """The keys that `derived` reads."""
    return {"num_key_value_heads": a.num_query_groups, "head_dim": a.head_dim, **write_rope(a.rope)}


SLIDING, FULL = "sliding_attention", "full_attention"


def windows(config: Config) -> dict[str, Any]:
    """The window and its layers of Qwen2-like configs: sliding_window, use_sliding_window, max_window_layers, layer_types."""
    window, count = config.get("sliding_window", 4096), config.get("num_hidden_layers", 32)
    if not config.get("use_sliding_window", False) or window is None:
        return {"window": None, "window_layers": None}
    full = min(config.get("max_window_layers", 28), count)
    types = config.get("layer_types") or [FULL] * full + [SLIDING] * (count - full)
    sliding = tuple(layer for layer, kind in enumerate(types) if kind == SLIDING)
    return {
        "window": window if sliding else None,
        "window_layers": sliding if sliding and len(sliding) < count else None,
    }


def window_refusal(config: Config) -> str | None:
    """Why the windows of such a config cannot be converted, or None."""
    types = config.get("layer_types") or ()
    if unknown := set(types) - {SLIDING, FULL}:
        return f"layer_types: {', '.join(sorted(unknown))} is not known"
    if SLIDING in types and (not config.get("use_sliding_window", False) or config.get("sliding_window", 4096) is None):
        return "layer_types has sliding attention but use_sliding_window is off"
    return None


def window_keys(a: Architecture) -> dict[str, Any]:
    """The keys that `windows` reads."""
    if a.window is None:
        return {"use_sliding_window": False}
    keys: dict[str, Any] = {"use_sliding_window": True, "sliding_window": a.window, "max_window_layers": 0}
    if a.window_layers is not None:
        kinds = [SLIDING if layer in a.window_layers else FULL for layer in range(a.num_layers)]
        keys |= {"max_window_layers": a.window_layers[0], "layer_types": kinds}
    return keys
