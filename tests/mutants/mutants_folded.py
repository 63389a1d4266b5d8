"""Families with something folded into their weights (gamma - 1, factors, a normalised head), and gpt-oss."""

from __future__ import annotations

import math

import torch

from catalogue import Mutant
from planting import exchanged, in_args, in_tensors

ALTERNATE = "experts.linear_fc1.weight0"


def alternate(value: torch.Tensor) -> torch.Tensor:
    """Gate and up rows in turn, as gpt-oss has them on disk."""
    return value.view(2, -1, value.shape[-1]).transpose(0, 1).reshape(value.shape)


def raw_head(value: torch.Tensor) -> torch.Tensor:
    """Rows of any length where the model normalises them."""
    return value * torch.linspace(0.3, 3, len(value))[:, None]


BIAS = "decoder.layers.1.mlp.experts.linear_fc1.bias"

# fmt: off
MUTANTS = tuple(Mutant(name, family, model, plant, **more) for name, family, model, plant, more in [
    ("Gemma: gamma without the one", "folded", "gemma", in_args(apply_layernorm_1p=False), {"diff": "off_by_one", "seen": "gamma without +1"}),
    ("Nemotron: gamma without the one", "folded", "nemotron", in_args(apply_layernorm_1p=False), {"diff": "off_by_one"}),
    ("Gemma: the embedding's factor forgotten", "folded", "gemma", in_tensors("word_embeddings.weight", lambda value: value / math.sqrt(96)), {}),
    ("Gemma: gelu by erf", "folded", "gemma", in_args(hf_hidden_act="gelu"), {"seen": "MB 7d3e03f75"}),
    ("Nemotron: gelu for squared relu", "folded", "nemotron", in_args(squared_relu=False), {}),
    ("Granite: the residual factor forgotten", "folded", "granite", in_tensors("linear_fc2.weight", lambda value: value / 0.22), {"diff": "scaled"}),
    ("Granite: the logits' factor forgotten", "folded", "granite", in_tensors("final_layernorm.weight", lambda value: value * 8), {"diff": "scaled"}),
    ("Granite: the attention's own scale dropped", "folded", "granite", in_args(softmax_scale=None), {}),
    ("NormHead forgotten: the head's rows as they are stored", "folded", "llama", in_tensors("output_layer.weight", raw_head), {"seen": "Baichuan 2"}),
    ("gpt-oss: gate and up rows in turn", "gpt-oss", "gpt_oss", in_tensors(ALTERNATE, alternate), {"diff": "gate_up_interleaved"}),
    ("gpt-oss: sinks dropped", "gpt-oss", "gpt_oss", in_tensors("softmax_offset", lambda value: torch.full_like(value, -1e4)), {}),
    ("gpt-oss: sinks of other heads", "gpt-oss", "gpt_oss", in_tensors("softmax_offset", lambda value: value.roll(1)), {}),
    ("gpt-oss: window on the other layers", "gpt-oss", "gpt_oss", in_args(window_attn_skip_freq=[0, 1, 0, 1]), {}),
    ("gpt-oss: window on all layers", "gpt-oss", "gpt_oss", in_args(window_attn_skip_freq=None), {}),
    ("gpt-oss: window one too long", "gpt-oss", "gpt_oss", in_args(window_size=(8, 0)), {"seen": "mcore-bridge"}),
    ("gpt-oss: another expert's bias", "gpt-oss", "gpt_oss", exchanged(BIAS + "2", BIAS + "3"), {"diff": "experts_exchanged"}),
    ("gpt-oss: router bias zeroed", "gpt-oss", "gpt_oss", in_tensors("router.bias", torch.zeros_like), {"diff": "zeroed"}),
    ("gpt-oss: the offset of up dropped", "gpt-oss", "gpt_oss", in_args(glu_linear_offset=0.0), {}),
])
