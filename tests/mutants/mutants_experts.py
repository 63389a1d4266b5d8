"""Mixtures of experts: Mixtral, Qwen-MoE, GLM-4.5, dots1."""

from __future__ import annotations

from pathlib import Path

import torch

from catalogue import Mutant
from mutants_dense import halves_swapped
from planting import State, between_ranks, both, exchanged, in_args, in_state, in_tensors, rank_files, removed

EP2 = ("--ep", 2)
MOE = "decoder.layers.{}.mlp."


def experts_shifted_by_one(state: State) -> None:
    """Expert e holds expert e + 1."""
    for kind in ("linear_fc1.weight", "linear_fc2.weight"):
        for start in {name.rsplit("weight", 1)[0] + "weight" for name in state if f".experts.{kind}" in name}:
            held = [state[f"{start}{number}"] for number in range(8)]
            for number in range(8):
                state[f"{start}{number}"] = held[(number + 1) % 8]


def router_of_one_rank(checkpoint: Path) -> None:
    """The router is on every expert parallel rank: on one of them it is another."""
    with rank_files(checkpoint) as files:
        state = files[0, 1]["model"]
        name = MOE.format(1) + "router.weight"
        state[name] = state[name].roll(1, 0)


def is_expert(name: str) -> bool:
    return ".experts.linear_" in name and not name.endswith("_extra_state")


# fmt: off
MUTANTS = tuple(Mutant(name, "MoE", model, plant, options, **more) for name, model, options, plant, more in [
    ("experts of two ep ranks exchanged", "mixtral", EP2, between_ranks(is_expert, (0, 0), (0, 1)), {"diff": "ep_ranks_exchanged", "seen": "MB #1716, verl #2086"}),
    ("experts shifted by one", "mixtral", (), in_state(experts_shifted_by_one), {"diff": "experts_rotated"}),
    ("gate and up of all experts swapped", "mixtral", (), both(*(in_tensors(f"experts.linear_fc1.weight{number}", halves_swapped) for number in range(8))), {"diff": "gate_up_swapped", "seen": "w1 and w3"}),
    ("one expert zeroed", "mixtral", (), in_tensors(MOE.format(1) + "experts.linear_fc2.weight5", torch.zeros_like), {"diff": "zeroed", "seen": "MB's verifier passes it"}),
    ("one expert missing", "mixtral", EP2, removed(MOE.format(1) + "experts.linear_fc1.weight3"), {"diff": "missing", "seen": "verl #2086, MLM #5844"}),
    ("one expert's projection transposed", "mixtral", (), in_tensors(MOE.format(1) + "experts.linear_fc2.weight5", torch.t), {"diff": "transposed"}),
    ("two experts' down projections exchanged", "dots1", (), exchanged(MOE.format(3) + "experts.linear_fc2.weight2", MOE.format(3) + "experts.linear_fc2.weight3"), {"diff": "experts_exchanged"}),
    ("router rows rotated in one layer", "qwen3_moe", (), in_tensors(MOE.format(2) + "router.weight", lambda value: value.roll(1, 0)), {"diff": "experts_rotated"}),
    ("router that differs between ep ranks", "mixtral", EP2, router_of_one_rank, {"diff": "copies", "silent": True}),
    ("routers of two layers exchanged", "qwen3_moe", (), exchanged("layers.1.mlp.router", "layers.2.mlp.router"), {"diff": "layers_exchanged"}),
    ("softmax over all experts, not the chosen", "mixtral", (), in_args(moe_router_pre_softmax=True), {"seen": "norm_topk_prob"}),
    ("softmax over the chosen, not over all", "qwen2_moe", (), in_args(moe_router_pre_softmax=False), {}),
    ("one expert per token more", "mixtral", (), in_args(moe_router_topk=3), {}),
    ("one expert per token less", "qwen3_moe", (), in_args(moe_router_topk=1, moe_router_pre_softmax=True), {}),
    ("the shared expert's gate dropped", "qwen2_moe", (), both(removed("shared_experts.gate_weight"), in_args(moe_shared_expert_gate=False)), {"diff": "missing"}),
    ("the shared expert zeroed", "qwen2_moe", (), in_tensors("shared_experts.linear_fc2.weight", torch.zeros_like), {"diff": "zeroed"}),
    ("expert bias zeroed", "glm4_moe", (), in_tensors(".router.expert_bias", torch.zeros_like), {"diff": "zeroed"}),
    ("expert bias scaled in the last layer", "dots1", (), in_tensors(MOE.format(3) + "router.expert_bias", lambda value: value * 0.5), {"diff": "scaled"}),
    ("rope over whole heads, not the half", "glm4_moe", (), in_args(rotary_percent=1.0), {}),
    ("the routed scaling factor dropped", "dots1", (), in_args(moe_router_topk_scaling_factor=None), {"seen": "DeepSeek ports"}),
    ("the dense layer's MLP is another layer's", "qwen2_moe_mixed", (), in_tensors(".mlp.linear_fc2.weight", lambda value: value.flip(0)), {"diff": "channels_reversed"}),
])
