"""Faults in Hugging Face directories that were exported from Megatron: tensors and config.json."""

from __future__ import annotations

import torch

from catalogue import Mutant
from planting import State, both, in_config, in_directory

LAYERS = "model.layers.{}."
HF = ("hf",)


def contiguous_split(state: State) -> None:
    """linear_qkv (g (q d + d + d)) split as if it were all queries, all keys, all values."""
    for layer in range(4):
        names = [LAYERS.format(layer) + f"self_attn.{part}_proj.weight" for part in "qkv"]
        q, k, v = (state[name] for name in names)
        fused = torch.cat([q.view(4, 2, 8, -1), k.view(4, 1, 8, -1), v.view(4, 1, 8, -1)], 1).flatten(0, 2)
        state |= dict(zip(names, fused.split([64, 32, 32]), strict=True))


def swapped(one: str, other: str):
    def change(state: State) -> None:
        for name in [name for name in state if one in name]:
            mate = name.replace(one, other)
            state[name], state[mate] = state[mate], state[name]

    return change


def padded(state: State) -> None:
    """The rows of the padded vocabulary exported with the rest."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(8, 64)])


def without(part: str):
    def change(state: State) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return change


def rounded(state: State) -> None:
    for name in state:
        state[name] = state[name].half().float()


# fmt: off
MUTANTS = tuple(Mutant(name, "exported", model, plant, HF, **more) for name, model, plant, more in [
    ("q, k, v split one after the other", "llama", in_directory(contiguous_split), {"diff": "qkv_order"}),
    ("gate and up swapped in the export", "llama", in_directory(swapped("gate_proj", "up_proj")), {"diff": "gate_up_swapped"}),
    ("keys and values swapped in the export", "llama", in_directory(swapped("k_proj", "v_proj")), {"diff": "key_value_swapped"}),
    ("padding rows exported, config unchanged", "llama", in_directory(padded), {"diff": "padded_rows", "seen": "MB #1473"}),
    ("padding rows exported, config with them", "llama", both(in_directory(padded), in_config(vocab_size=128)), {"diff": "padded_rows", "seen": "MB #1473"}),
    ("the head is missing", "llama", in_directory(without("lm_head")), {"diff": "missing", "seen": "slime #345"}),
    ("one layer missing", "llama", in_directory(without("layers.3.")), {"diff": "missing", "seen": "MB #2892"}),
    ("one layer missing, config one less", "llama", both(in_directory(without("layers.3.")), in_config(num_hidden_layers=3)), {"diff": "missing"}),
    ("the head tied in the config", "llama", both(in_directory(without("lm_head")), in_config(tie_word_embeddings=True)), {"diff": "missing"}),
    ("rope_theta missing in the config", "qwen2", in_config(rope_theta=None, rope_parameters=None), {"seen": "MB #3077"}),
    ("rope_scaling missing in the config", "llama3", in_config(rope_scaling=None, rope_parameters=None, rope_theta=5e5), {"seen": "MB #5097"}),
    ("llama3 constants of another model in the config", "llama3", in_config(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}), {}),
    ("sliding_window missing in the config", "mistral", in_config(sliding_window=None), {}),
    ("rms_norm_eps missing in the config", "llama", in_config(rms_norm_eps=1e-6), {}),
    ("another activation in the config", "llama", in_config(hidden_act="gelu"), {}),
    ("norm_topk_prob turned", "qwen3_moe", in_config(norm_topk_prob=False), {}),
    ("experts per token of another model", "mixtral", in_config(num_experts_per_tok=1), {}),
    ("all weights rounded to fp16", "llama", in_directory(rounded), {"diff": "rounded"}),
    ("expert w1 and w3 swapped", "mixtral", in_directory(swapped(".w1.", ".w3.")), {"diff": "gate_up_swapped"}),
    ("MTP layers lost", "deepseek_v3_mtp", in_directory(without("layers.4.")), {"silent": True, "diff": "missing", "seen": "SW #6644"}),
])
