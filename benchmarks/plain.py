"""The plain script that everyone writes, for a Llama: load everything, cut or join the tensors, save.

    python benchmarks/plain.py hf2megatron|megatron2hf|reshard SRC DST FORMAT TP PP [NEW_TP NEW_PP]

It makes the tensors that shardtool makes, with nothing around them: no checks, no index, no common.pt. The model's
config.json lies beside SRC.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

ROWS = ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")  # cut along dim 0, the next two along dim 1
COLUMNS = ("linear_proj", "linear_fc2")


def load_hf(folder: Path) -> Tensors:
    held: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        held |= load_file(file)
    return held


def to_megatron(hf: Tensors, config: dict) -> Tensors:
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    hidden, d = config["hidden_size"], config["head_dim"]
    out = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        q, k, v = (hf[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv")
        q = q.view(groups, heads // groups * d, hidden)
        k, v = (item.view(groups, d, hidden) for item in (k, v))
        out[ours + "self_attention.linear_qkv.weight"] = torch.cat([q, k, v], 1).reshape(-1, hidden)
        out[ours + "self_attention.linear_proj.weight"] = hf[theirs + "self_attn.o_proj.weight"]
        out[ours + "self_attention.linear_qkv.layer_norm_weight"] = hf[theirs + "input_layernorm.weight"]
        out[ours + "mlp.linear_fc1.layer_norm_weight"] = hf[theirs + "post_attention_layernorm.weight"]
        out[ours + "mlp.linear_fc1.weight"] = torch.cat(
            [hf[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        )
        out[ours + "mlp.linear_fc2.weight"] = hf[theirs + "mlp.down_proj.weight"]
    return out


def to_hf(held: Tensors, config: dict) -> Tensors:
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    hidden, d = config["hidden_size"], config["head_dim"]
    out = {
        "model.embed_tokens.weight": held["embedding.word_embeddings.weight"][: config["vocab_size"]].contiguous(),
        "model.norm.weight": held["decoder.final_layernorm.weight"],
        "lm_head.weight": held["output_layer.weight"][: config["vocab_size"]].contiguous(),
    }
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = held[ours + "self_attention.linear_qkv.weight"].view(groups, (heads // groups + 2) * d, hidden)
        for name, part in zip("qkv", qkv.split([heads // groups * d, d, d], 1), strict=True):
            out[f"{theirs}self_attn.{name}_proj.weight"] = part.reshape(-1, hidden)
        out[theirs + "self_attn.o_proj.weight"] = held[ours + "self_attention.linear_proj.weight"]
        out[theirs + "input_layernorm.weight"] = held[ours + "self_attention.linear_qkv.layer_norm_weight"]
        out[theirs + "post_attention_layernorm.weight"] = held[ours + "mlp.linear_fc1.layer_norm_weight"]
        for name, part in zip(("gate", "up"), held[ours + "mlp.linear_fc1.weight"].chunk(2), strict=True):
            out[f"{theirs}mlp.{name}_proj.weight"] = part.clone()
        out[theirs + "mlp.down_proj.weight"] = held[ours + "mlp.linear_fc2.weight"]
    return out


def cut(name: str, tensor: torch.Tensor, tp: int) -> list[torch.Tensor]:
    if name.endswith("layer_norm_weight") or tensor.dim() < 2:
        return [tensor] * tp
    if "linear_fc1" in name:
        gate, up = tensor.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]
    if any(part in name for part in COLUMNS):
        return [part.clone() for part in tensor.chunk(tp, 1)]
    return [part.clone() for part in tensor.chunk(tp)]  # a view would save all of the tensor


def join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if name.endswith("layer_norm_weight") or parts[0].dim() < 2:
        return parts[0]
    if "linear_fc1" in name:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts, 1 if any(part in name for part in COLUMNS) else 0)


def save_legacy(full: Tensors, folder: Path, layers: int, tp: int, pp: int) -> None:
    ranks: dict[tuple[int, int], Tensors] = {(t, p): {} for t in range(tp) for p in range(pp)}
    per_stage = layers // pp
    for name, tensor in full.items():
        stage, local = (0 if name.startswith("embedding") else pp - 1), name
        if ".layers." in name:
            layer = int(name.split(".")[2])
            stage = layer // per_stage
            local = name.replace(f".layers.{layer}.", f".layers.{layer % per_stage}.")
        for rank, part in enumerate(cut(name, tensor, tp)):
            ranks[rank, stage][local] = part
    for (t, p), model in ranks.items():
        name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
        (folder / name).mkdir(parents=True)
        torch.save({"model": model, "checkpoint_version": 3.0}, folder / name / "model_optim_rng.pt")


def load_legacy(folder: Path, layers: int, tp: int, pp: int) -> Tensors:
    full: Tensors = {}
    for p in range(pp):
        names = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") for t in range(tp)]
        shards = [torch.load(folder / name / "model_optim_rng.pt", weights_only=False)["model"] for name in names]
        for local, value in shards[0].items():
            if not isinstance(value, torch.Tensor):
                continue
            name = local
            if ".layers." in local:
                layer = int(local.split(".")[2])
                name = local.replace(f".layers.{layer}.", f".layers.{layer + p * (layers // pp)}.")
            full[name] = join(name, [shard[local] for shard in shards])
    return full


def save_dist(full: Tensors, folder: Path) -> None:
    folder.mkdir(parents=True)
    dcp.save(full, checkpoint_id=folder, no_dist=True)


def load_dist(folder: Path) -> Tensors:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    full = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in metadata.items()
        if isinstance(item, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(full, checkpoint_id=folder, no_dist=True)
    return {name: part for stacked, tensor in full.items() for name, part in unstacked(stacked, tensor)}


def unstacked(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """shardtool and Megatron stack layers of one kind in `torch_dist`; this script saves them by name."""
    if not name.startswith("decoder.layers.") or name.split(".")[2].isdecimal():
        return [(name, tensor)]
    rest = name.removeprefix("decoder.layers.")
    return [(f"decoder.layers.{layer}.{rest}", part) for layer, part in enumerate(tensor)]


def main(direction: str, src: str, dst: str, form: str, *sizes: str) -> None:
    config = json.loads((Path(src).parent / "config.json").read_text())
    source, target = Path(src), Path(dst)
    tp, pp, *new = map(int, sizes)
    layers = config["num_hidden_layers"]
    if direction == "hf2megatron":
        full = to_megatron(load_hf(source), config)
    else:
        folder = (
            next(path.parent for path in source.rglob("*.metadata")) if form == "torch_dist" else source / "release"
        )
        full = load_dist(folder) if form == "torch_dist" else load_legacy(folder, layers, tp, pp)
    if direction == "megatron2hf":
        target.mkdir(parents=True)
        save_file(to_hf(full, config), target / "model.safetensors")
    elif form == "torch_dist":
        save_dist(full, target / "release")
    else:
        save_legacy(full, target / "release", layers, *(new or [tp, pp]))


if __name__ == "__main__":
    main(*sys.argv[1:])
