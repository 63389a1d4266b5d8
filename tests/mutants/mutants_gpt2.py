"""GPT-2: LayerNorm, learned positions, biases everywhere, transposed Conv1D weights."""

from __future__ import annotations

import torch

from catalogue import Mutant
from planting import exchanged, in_args, in_tensors, removed

HEADS = 8


def stacked(value: torch.Tensor) -> torch.Tensor:
    """All queries, all keys, all values, as c_attn has them, in place of head by head."""
    return value.reshape(HEADS, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)


def by_dim(value: torch.Tensor) -> torch.Tensor:
    """Query, key and value in turn at every dim of a head, the order of Megatron's checkpoint version 1."""
    return value.reshape(HEADS, 3, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


# fmt: off
MUTANTS = tuple(Mutant(name, "GPT-2", "gpt2", plant, options, **more) for name, options, plant, more in [
    ("learned positions shifted by two", (), in_tensors("position_embeddings.weight", lambda value: value.roll(2, 0)), {"diff": "positions_rotated", "seen": "OPT's offset"}),
    ("gelu by erf for gelu by tanh", (), in_args(bias_gelu_fusion=False), {}),
    ("one Conv1D output projection not transposed", (), in_tensors("layers.1.self_attention.linear_proj.weight", torch.t), {"diff": "transposed"}),
    ("c_attn taken over as it is", (), in_tensors("linear_qkv.weight", stacked), {"diff": "qkv_order"}),
    ("c_attn's bias taken over as it is", (), in_tensors("linear_qkv.bias", stacked), {"diff": "qkv_order"}),
    ("q, k, v in the order of checkpoint version 1", (), in_tensors("linear_qkv.weight", by_dim), {"diff": "qkv_interleaved", "seen": "checkpoint_version below 2"}),
    ("biases of the norms zeroed", (), in_tensors("layer_norm_bias", torch.zeros_like), {"diff": "zeroed"}),
    ("bias of one output projection missing", (), removed("layers.2.self_attention.linear_proj.bias"), {"diff": "missing"}),
    ("bias of one output projection zeroed", (), in_tensors("layers.2.self_attention.linear_proj.bias", torch.zeros_like), {"diff": "zeroed"}),
    ("a row-parallel bias added on every tp rank", ("--tp", 2), in_tensors("linear_fc2.bias", lambda value: value * 2), {"diff": "scaled"}),
    ("norms before attention and MLP exchanged", (), exchanged("self_attention.linear_qkv.layer_norm", "mlp.linear_fc1.layer_norm"), {"diff": "moved"}),
    ("epsilon 1e-6 for 1e-5 in GPT-2", (), in_args(norm_epsilon=1e-6), {}),
    ("one head's rows reversed", (), in_tensors("layers.0.self_attention.linear_qkv.weight", lambda value: torch.cat([value[:8].flip(0), value[8:]])), {}),
])
