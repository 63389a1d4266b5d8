"""Latent attention: DeepSeek-V3, Moonlight, DeepSeek-V2-Lite."""

from __future__ import annotations

import torch

from catalogue import Mutant
from planting import State, exchanged, in_args, in_directory, in_tensors

HEADS, NOPE, ROPE = 8, 16, 8
HALVES = torch.cat([torch.arange(NOPE), NOPE + torch.arange(ROPE).reshape(-1, 2).t().flatten()])


def per_head(value: torch.Tensor) -> torch.Tensor:
    return value.unflatten(0, (HEADS, -1))


def key_rope_halves(value: torch.Tensor) -> torch.Tensor:
    """The rope rows, after the latent ones, in the order of Llama's rope."""
    return value[HALVES]


def query_rope_halves(value: torch.Tensor) -> torch.Tensor:
    return per_head(value)[:, HALVES].flatten(0, 1)


def rope_first(value: torch.Tensor) -> torch.Tensor:
    """Rope dims before the others in each query head."""
    return per_head(value).roll(ROPE, 1).flatten(0, 1)


def keys_and_values_swapped(value: torch.Tensor) -> torch.Tensor:
    return value.unflatten(0, (HEADS, 2, NOPE)).flip(1).flatten(0, 2)


def keys_before_values(value: torch.Tensor) -> torch.Tensor:
    """All keys, then all values, in place of head by head."""
    return value.unflatten(0, (HEADS, 2, NOPE)).transpose(0, 1).flatten(0, 2)


def scales(change):
    """A fault in the block scales of FP8 matrices."""

    def apply(state: State) -> None:
        for name in [name for name in state if name.endswith("_scale_inv")]:
            state[name] = change(state[name])

    return in_directory(apply)


def transposed(value: torch.Tensor) -> torch.Tensor:
    """Block (i, j) has the scale of block (j, i), where there is one."""
    size = min(value.shape)
    result = value.clone()
    result[:size, :size] = value[:size, :size].t()
    return result


FP8 = ("source", "--format", "torch", "--dtype", "fp32")
KV_UP = "linear_kv_up_proj.layer_norm_weight"

# fmt: off
MUTANTS = tuple(Mutant(name, "MLA", model, plant, options, **more) for name, model, options, plant, more in [
    ("rope rows of the shared key as halves", "deepseek_v3", (), in_tensors(".linear_kv_down_proj.weight", key_rope_halves), {"diff": "rope_halves"}),
    ("rope rows of the queries as halves", "moonlight", (), in_tensors(".linear_q_proj.weight", query_rope_halves), {"diff": "rope_halves"}),
    ("rope dims of the queries first", "moonlight", (), in_tensors(".linear_q_proj.weight", rope_first), {"diff": "query_dims_rotated"}),
    ("keys and values swapped in each head", "deepseek_v3", (), in_tensors(".linear_kv_up_proj.weight", keys_and_values_swapped), {}),
    ("all keys before all values", "deepseek_v3", (), in_tensors(".linear_kv_up_proj.weight", keys_before_values), {}),
    ("latent norms of two layers exchanged", "deepseek_v3", (), exchanged("layers.1.self_attention." + KV_UP, "layers.2.self_attention." + KV_UP), {"diff": "layers_exchanged"}),
    ("heads of the output projection rotated", "deepseek_v3", (), in_tensors(".linear_proj.weight", lambda value: value.unflatten(1, (HEADS, -1)).roll(1, 1).flatten(1, 2)), {"diff": "attention_heads_rotated"}),
    ("yarn dropped", "deepseek_v3", (), in_args(rope_type="rope", rotary_scaling_factor=1.0), {}),
    ("yarn's original length ignored", "deepseek_v3", (), in_args(original_max_position_embeddings=4096), {"seen": "rope scaling past the original length"}),
    ("yarn's factor 20 for 40", "deepseek_v3", (), in_args(rotary_scaling_factor=20.0), {}),
    ("yarn's softmax scale dropped", "deepseek_v3", (), in_args(mscale_all_dim=0.0), {}),
    ("expert groups dropped", "deepseek_v3", (), in_args(moe_router_num_groups=None, moe_router_group_topk=None), {}),
    ("sigmoid scores for softmax scores", "deepseek_v2_lite", (), in_args(moe_router_score_function="sigmoid"), {}),
    ("another scaling factor of the experts", "moonlight", (), in_args(moe_router_topk_scaling_factor=2.0), {}),
    ("FP8 block scales transposed", "deepseek_v3_fp8", FP8, scales(transposed), {"seen": "block-FP8 loaders"}),
    ("FP8 block scales in reverse order", "deepseek_v3_fp8", FP8, scales(lambda value: value.flip(0)), {}),
    ("FP8 block scales dropped", "deepseek_v3_fp8", FP8, scales(torch.ones_like), {"seen": "MB #3778"}),
    ("FP8 block scales divided by, not multiplied", "deepseek_v3_fp8", FP8, scales(torch.reciprocal), {}),
    ("FP8 block scales rounded to bf16", "deepseek_v3_fp8", FP8, scales(lambda value: value.bfloat16().float()), {"seen": "slime"}),
    ("the halves of an MTP projection swapped", "deepseek_v3_mtp", (), in_tensors("eh_proj.weight", lambda value: torch.cat(value.chunk(2, 1)[::-1], 1)), {"silent": True, "seen": "MiMo"}),
])
