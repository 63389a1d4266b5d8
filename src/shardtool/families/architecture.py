"""What a model is, in neither dialect: the numbers and switches that Hugging Face and Megatron both must agree on."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field


class RopeScaling(Struct, frozen=True):
    """A change of the rotary frequencies.

    `linear` uses `factor`; `llama3` the factors and `original_max_positions`; `yarn` all but the first two factors.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


class Rope(Struct, frozen=True):
    """Rotary position embedding over the first `fraction` of each head; `interleaved` pairs (2i, 2i+1), else halves."""

    theta: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


class MixtureOfExperts(Struct, frozen=True):
    """The expert layers: which layers they are, how a token's experts are chosen, what is shared.

    `pre_softmax`: softmax over all experts, then the top k (Hugging Face `norm_topk_prob` false); else over the top k.
    `groups` and `group_top_k` limit a token to some groups of experts, which the sum of their best `group_score` experts
    ranks (None: of their best top_k // group_top_k, as megatron-core does). `expert_bias` shifts the choice, not the weights.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    layers: tuple[int, ...]
    score: Literal["softmax", "sigmoid"] = "softmax"
    pre_softmax: bool = False
    scaling: float | None = None
    expert_bias: bool = False
    groups: int | None = None
    group_top_k: int | None = None
    group_score: int | None = None
    shared_ffn_size: int = 0
    shared_gate: bool = False


class LatentAttention(Struct, frozen=True):
    """Multi-latent attention. `query_rank` None means that queries are projected directly.

    `query_norm`: then there is one more norm of the hidden state before that projection, which megatron-core 0.19 and
    newer has with qk_layernorm (mla_qk_norm_config.py) and no Hugging Face model has.
    """

    query_rank: int | None
    key_value_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_norm: bool = False


class LinearAttention(Struct, frozen=True):
    """Gated delta net: the layers that have it instead of attention, its heads, their dims, and the convolution's kernel."""

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int


class Folded(Struct, frozen=True):
    """What a Hugging Face model computes in its forward pass and Megatron's weights contain instead.

    `embedding` multiplies the embedded tokens (`rounded`: first rounded to the weights' dtype, as the model does it),
    `residual` what attention and MLP add to the residual stream; `logits_divisor` divides the logits, and
    `normalised_head` divides each row of the head by its norm. `tied`: embedding and head are one tensor there; with a
    factor in one of them Megatron has them apart.
    """

    embedding: float = 1.0
    rounded: bool = False
    residual: float = 1.0
    logits_divisor: float = 1.0
    normalised_head: bool = False
    tied: bool = False


class Architecture(Struct, frozen=True):
    """A decoder-only transformer. Sizes are whole-model sizes; `vocab_size` is the true one, without padding.

    `rope` None means learned absolute positions; behind them the table of positions may have `spare_positions` rows that
    no token uses. `softmax_scale` None means one over the root of the head dim. `tied` is Megatron's: see `Folded`.
    `window` is the number of tokens that a token sees, itself included
    (Hugging Face `sliding_window`; megatron-core's `window_size=(window - 1, 0)`), in `window_layers` (None: in all).
    A gated MLP computes activation(gate) * (up + `glu_offset`); with `clamp` gate is first cut off above it, and up on
    both sides. `sinks`: each head has a logit of its own in the softmax, which no value belongs to.
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
    norm_weights: bool = True  # the norms of OLMo 1 have neither weight nor bias; megatron-core has none such
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"] = "silu"
    gated: bool = True
    glu_offset: float = 0.0
    clamp: float | None = None
    qkv_bias: bool = False
    linear_bias: bool = False  # every linear of the layer has a bias: qkv, experts and router included
    out_bias: bool = False  # the attention's output has a bias, the MLP none; megatron-core has no such layer
    zero_out_bias: bool = False  # ... and Megatron has none: in Hugging Face it must be zeros, and is written so
    qk_norm: bool = False  # per head, before rope
    qk_norm_whole: bool = False  # ... over all heads at once instead
    tied: bool = False
    rope: Rope | None = field(default_factory=Rope)
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    sinks: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    moe: MixtureOfExperts | None = None
    mla: LatentAttention | None = None
    no_rope_layers: tuple[int, ...] = ()  # layers whose attention has no position embedding
    mtp_layers: int = 0  # multi-token-prediction layers after the last layer
    mtp_repeats: int = 1  # how often the one such layer is applied (megatron-core 0.17, mtp_use_repeated_layer)
    output_gate: bool = False  # attention's output is multiplied by the sigmoid of a further projection
    linear: LinearAttention | None = None
    spare_positions: int = 0
    softmax_scale: float | None = None
    folded: Folded | None = None
    centred_norms: bool = False  # Megatron stores norms as gamma - 1 (Transformer Engine's alone): no other function

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        return self.moe.layers if self.moe else ()

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """The layers with linear attention."""
        return self.linear.layers if self.linear else ()

    @property
    def mtp_depth(self) -> int:
        """The number of tokens predicted ahead: Megatron's mtp_num_layers."""
        return self.mtp_layers * self.mtp_repeats

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike, so that torch_dist stacks them."""
        return self.linear is None and len(self.moe_layers) in (0, self.num_layers)
