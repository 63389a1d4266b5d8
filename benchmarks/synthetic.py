"""Synthetic Hugging Face checkpoints: the shapes of real families at a chosen size, random bf16 values, made on the spot."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from shardtool.families.blocks import axis_sizes
from shardtool.families.registry import family_of
from shardtool.formats import safetensors_files
from shardtool.formats.stored import ITEMSIZE
from shardtool.layout.huggingface import huggingface_layout

SHARD_BYTES = 2 * 10**9
BLOCK = 1 << 20
QUANTISED_BLOCK = 128


def llama(gigabytes: float) -> dict[str, Any]:
    """A Llama of about this size: the layers of Llama-3-8B from 3 GB on, of TinyLlama below, in a multiple of 4."""
    hidden, ffn = (4096, 14336) if gigabytes >= 3 else (2048, 5632)
    per_layer = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * ffn)
    layers = max(4, 4 * round((gigabytes * 1e9 - 4 * 32000 * hidden) / per_layer / 4))
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip


def mixtral(gigabytes: float) -> dict[str, Any]:
    """A Mixtral with many small experts: 64 in each layer, 0.5 MB a matrix, so that tensors count and not only bytes."""
    hidden, ffn, experts = 512, 512, 64
    per_layer = 2 * (experts * 3 * hidden * ffn + 2 * hidden * hidden + 4 * hidden * 128 + experts * hidden)
    layers = max(4, 4 * round((gigabytes * 1e9 - 4 * 32000 * hidden) / per_layer / 4))
    return {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 64, "num_local_experts": experts, "num_experts_per_tok": 2, "vocab_size": 32000,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip


def fp8(gigabytes: float) -> dict[str, Any]:
    """A Llama of this size after dequantisation, its linear weights in FP8 with a scale per block of 128 x 128."""
    quantisation = {"quant_method": "fp8", "weight_block_size": [QUANTISED_BLOCK, QUANTISED_BLOCK], "fmt": "e4m3"}
    return {**llama(gigabytes), "quantization_config": quantisation}


def tensors(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor that the config's model has, in the order of the layers."""
    family = family_of(config)
    a = family.read_config(config)
    layout = huggingface_layout(family.rules(a), axis_sizes(a))
    found = [
        (ids, key[1], layout.shape(piece)) for piece in layout.pieces for ids in piece.ids() for key in [piece.key(ids)]
    ]
    found.sort(key=lambda item: item[0])
    if "quantization_config" not in config:
        return [(name, shape, "bfloat16") for _, name, shape in found]
    held = []
    for _, name, shape in found:
        if name.endswith("_proj.weight"):
            blocks = tuple(-(-size // QUANTISED_BLOCK) for size in shape)
            held += [(name, shape, "float8_e4m3fn"), (name + "_scale_inv", blocks, "float32")]
        else:
            held.append((name, shape, "bfloat16"))
    return held


def build(directory: Path, config: dict[str, Any]) -> int:
    """Write the checkpoint; its bytes. Values are random with exponents near 0, so that casts meet ordinary numbers.

    Where there is FP8, no byte is a NaN of it, and the scales are numbers below 2.
    """
    directory.mkdir(parents=True)
    specs = tensors(config)
    groups = safetensors_files.split_by_size(specs, SHARD_BYTES)
    names = safetensors_files.shard_names(len(groups))
    rng = np.random.default_rng(0)
    weight_map, total = {}, 0
    for name, group in zip(names, groups, strict=True):
        skeleton = safetensors_files.skeleton(group)
        total += skeleton.size
        with (directory / name).open("wb") as file:
            file.write(skeleton.parts[0][1])
            left = skeleton.size - len(skeleton.parts[0][1])
            while left:
                bits = rng.integers(0, 1 << 16, BLOCK, dtype=np.uint16)
                bits = bits & 0xBFBF if "quantization_config" in config else (bits & 0x83FF) | 0x3C00
                left -= file.write(bits.tobytes()[:left])
        weight_map.update({spec[0]: name for spec in group})
    if len(groups) > 1:
        count, size = sum(prod(spec[1]) for spec in specs), sum(prod(spec[1]) * ITEMSIZE[spec[2]] for spec in specs)
        (directory / safetensors_files.INDEX).write_bytes(safetensors_files.index_json(weight_map, size, count))
    (directory / "config.json").write_text(json.dumps(config))
    return total
