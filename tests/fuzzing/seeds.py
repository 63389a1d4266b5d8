"""The valid checkpoints that are broken: written by transformers, torch and this project, or saved by megatron-core."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from commands import convert
from shardtool import tiny

DATA = Path(__file__).parents[1] / "data" / "megatron-core"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 24, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A checkpoint, the file of it that is broken (a pattern), how, and the command that has to read it."""

    reader: str
    directory: Path
    pattern: str
    kind: str  # a name in mutations.KINDS
    command: tuple[str, ...]


TO_MEGATRON = ("hf2megatron", "--tp", "2", "--format", "torch", "--vocab-divisible-by", "4")
TO_HF = ("megatron2hf",)
RESHARD = ("reshard", "--tp", "1", "--format", "torch")


def build(root: Path) -> list[Seed]:
    """Build the checkpoints below `root` and list what is to be broken in them."""
    hf = tiny.build(CONFIG, root / "hf")
    sharded = tiny.build(CONFIG, root / "sharded", max_shard_size="6KB")
    old = root / "bin"
    shutil.copytree(hf, old)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    for directory in (hf, sharded, old):
        (directory / "generation_config.json").unlink(missing_ok=True)
    divisible = ("--vocab-divisible-by", 4)
    ranks = convert(hf, root / "ranks", "--format", "torch", "--tp", 2, "--pp", 2, *divisible)
    dist = convert(hf, root / "dist", "--format", "torch_dist", "--tp", 2, *divisible)
    real_ranks, real_dist = root / "real_ranks", root / "real_dist"
    shutil.copytree(DATA / "0.16.1" / "moe" / "torch", real_ranks)
    shutil.copytree(DATA / "0.14.0" / "dense" / "torch_dist", real_dist)
    new_dist = root / "new_dist"
    shutil.copytree(DATA / "0.19.2" / "dense" / "torch_dist", new_dist)
    return [
        Seed("safetensors", hf, "model.safetensors", "safetensors", TO_MEGATRON),
        Seed("safetensors", sharded, "model-*.safetensors", "safetensors", TO_MEGATRON),
        Seed("index", sharded, "model.safetensors.index.json", "json", TO_MEGATRON),
        Seed("index", sharded, "*", "files", TO_MEGATRON),
        Seed("config", hf, "config.json", "json", TO_MEGATRON),
        Seed("bin", old, "pytorch_model.bin", "torch_zip", TO_MEGATRON),
        Seed("ranks", ranks, "release/*/model_optim_rng.pt", "torch_zip", TO_HF),
        Seed("ranks", real_ranks, "iter_*/*/model_optim_rng.pt", "torch_zip", RESHARD),
        Seed("ranks", ranks, "release/*", "files", RESHARD),
        Seed("metadata", dist, "release/.metadata", "pickle", TO_HF),
        Seed("metadata", real_dist, "iter_*/.metadata", "pickle", RESHARD),
        Seed("common", dist, "release/common.pt", "torch_zip", TO_HF),
        Seed("common", real_dist, "iter_*/common.pt", "torch_zip", TO_HF),
        Seed("distcp", dist, "release/*.distcp", "bytes", TO_HF),
        Seed("distcp", new_dist, "iter_*/*.distcp", "bytes", TO_HF),
        Seed("distcp", dist, "release/*", "files", RESHARD),
        Seed("tracker", ranks, "latest_checkpointed_iteration.txt", "bytes", TO_HF),
        Seed("metadata_json", dist, "release/metadata.json", "json", TO_HF),
    ]


READERS = (
    "safetensors", "index", "config", "bin", "ranks", "metadata", "common", "distcp", "tracker", "metadata_json",
)  # fmt: skip
