"""What a model is, in neither dialect: the numbers and switches that Hugging Face and Megatron both must agree on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A change of the rotary frequencies. `llama3` uses all fields, `linear` only `factor`."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding over the first `fraction` of each head; `interleaved` pairs (2i, 2i+1), else halves."""

    theta: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer. Sizes are whole-model sizes; `vocab_size` is the true one, without padding.

    `rope` None means learned absolute positions. `window` is the number of tokens that a token sees, itself included
    (Hugging Face `sliding_window`; megatron-core's `window_size=(window - 1, 0)`).
    """

    family: str  # the Hugging Face model_type, or "" when only Megatron is concerned
    num_layers: int
    hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    linear_bias: bool = False  # every linear of the layer has a bias, qkv included
    qk_norm: bool = False  # per head, before rope
    tied: bool = False
    rope: Rope | None = field(default_factory=Rope)
    window: int | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
