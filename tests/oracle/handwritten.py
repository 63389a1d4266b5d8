"""The legacy Megatron layout once more, in plain torch, from Hugging Face tensors: written for the tests of the judge.

It shares nothing with shardtool's layouts. A mistake here shows in the logits: megatron-core loads what it writes.
"""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from shardtool.families.architecture import Architecture
from shardtool.layout.mesh import Mesh, chunks, padded_vocab, virtual_stages

VOCAB, PADDED = 120, 128

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, dict[str, object]] = {
    "llama": {**BASE, "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    "llama3": {**BASE, "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "linear": {
        **BASE,
        "model_type": "llama",
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "mistral": {**BASE, "model_type": "mistral", "sliding_window": 8, "rope_theta": 10000.0, "head_dim": 16},
    "qwen2": {
        **BASE,
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "qwen3": {**BASE, "model_type": "qwen3", "rope_theta": 1e6, "head_dim": 16},
    "stablelm": {**BASE, "model_type": "stablelm", "partial_rotary_factor": 0.5, "use_parallel_residual": False},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 8,
        "n_positions": 64,
        "n_inner": None,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
CONFIGS["gpt2_erf"] = {**CONFIGS["gpt2"], "activation_function": "gelu"}


def read(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def padded(table: Tensor, tp: int) -> Tensor:
    rows = padded_vocab(table.shape[0], PADDED // tp, tp)
    return torch.cat([table, torch.zeros(rows - table.shape[0], table.shape[1], dtype=table.dtype)])


def grouped(q: Tensor, k: Tensor, v: Tensor, arch: Architecture) -> Tensor:
    """Query heads of a group, its key, its value; then the next group."""
    groups = []
    for part in (q, k, v):
        groups.append(part.reshape(arch.num_query_groups, -1, *part.shape[1:]))
    return torch.cat(groups, dim=1).flatten(0, 1)


def layer_tensors(
    hf: Mapping[str, Tensor], index: int, arch: Architecture
) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """One layer under its local names, not split; a pair is (gate, up)."""
    if "wte.weight" in hf or "transformer.wte.weight" in hf:
        return gpt2_layer(hf, index, arch)
    at = f"model.layers.{index}."
    attention = "self_attention."
    layer: dict[str, Tensor | tuple[Tensor, Tensor]] = {
        "mlp.linear_fc1.weight": (hf[at + "mlp.gate_proj.weight"], hf[at + "mlp.up_proj.weight"]),
        "mlp.linear_fc2.weight": hf[at + "mlp.down_proj.weight"],
        attention + "linear_proj.weight": hf[at + "self_attn.o_proj.weight"],
    }
    for end in ("weight", "bias"):
        if at + f"self_attn.q_proj.{end}" in hf:
            q, k, v = (hf[at + f"self_attn.{name}_proj.{end}"] for name in "qkv")
            layer[attention + f"linear_qkv.{end}"] = grouped(q, k, v, arch)
        for theirs, ours in (("input_layernorm", "input_layernorm"), ("post_attention_layernorm", "pre_mlp_layernorm")):
            if at + f"{theirs}.{end}" in hf:
                layer[f"{ours}.{end}"] = hf[at + f"{theirs}.{end}"]
    for name in "qk":
        if at + f"self_attn.{name}_norm.weight" in hf:
            layer[attention + f"{name}_layernorm.weight"] = hf[at + f"self_attn.{name}_norm.weight"]
    return layer


def gpt2_layer(hf: Mapping[str, Tensor], index: int, arch: Architecture) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    at = f"transformer.h.{index}."
    layer: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for end in ("weight", "bias"):
        layer[f"input_layernorm.{end}"] = hf[at + f"ln_1.{end}"]
        layer[f"pre_mlp_layernorm.{end}"] = hf[at + f"ln_2.{end}"]
        q, k, v = (
            hf[at + f"attn.c_attn.{end}"].t().chunk(3) if end == "weight" else hf[at + f"attn.c_attn.{end}"].chunk(3)
        )
        layer[f"self_attention.linear_qkv.{end}"] = grouped(q, k, v, arch)
        for theirs, ours in (
            ("attn.c_proj", "self_attention.linear_proj"),
            ("mlp.c_fc", "mlp.linear_fc1"),
            ("mlp.c_proj", "mlp.linear_fc2"),
        ):
            value = hf[at + f"{theirs}.{end}"]
            layer[f"{ours}.{end}"] = value.t() if end == "weight" else value
    return layer


def split(name: str, value: Tensor | tuple[Tensor, Tensor], tp: int, rank: int) -> Tensor:
    """Rank `rank`'s part."""
    if isinstance(value, tuple):
        return torch.cat([part.chunk(tp)[rank] for part in value])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value.chunk(tp, dim=1)[rank].contiguous()
    if name.split(".")[-2] in {"linear_qkv", "linear_fc1"}:
        return value.chunk(tp)[rank].contiguous()
    return value.contiguous()


TE_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def te_name(name: str) -> str:
    for ours, theirs in TE_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def write(hf_directory: Path, out: Path, arch: Architecture, mesh: Mesh, *, te: bool = False) -> Path:
    """A legacy `torch` checkpoint of a Hugging Face directory."""
    hf = read(hf_directory)
    gpt2 = "transformer.wte.weight" in hf
    table = padded(hf["transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"], mesh.tp)
    head = table if arch.tied else padded(hf["lm_head.weight"], mesh.tp)
    norm = "transformer.ln_f" if gpt2 else "model.norm"
    split_up = virtual_stages(mesh) > 1
    for rank in range(mesh.tp):
        files: dict[int, dict[str, object]] = {}
        for chunk in chunks(mesh, arch.num_layers):
            model: OrderedDict[str, object] = OrderedDict()
            if chunk.embedding:
                model["embedding.word_embeddings.weight"] = table.chunk(mesh.tp)[rank].clone()
                if gpt2:
                    model["embedding.position_embeddings.weight"] = hf["transformer.wpe.weight"]
            for local, index in enumerate(chunk.layers):
                for name, value in layer_tensors(hf, index, arch).items():
                    key = f"decoder.layers.{local}.{te_name(name) if te else name}"
                    model[key] = split(name, value, mesh.tp, rank).clone()
                model[f"decoder.layers.{local}.mlp.linear_fc1._extra_state"] = None
            if chunk.head:
                for end in ("weight", "bias"):
                    if f"{norm}.{end}" in hf:
                        model[f"decoder.final_layernorm.{end}"] = hf[f"{norm}.{end}"]
                if not chunk.embedding or not arch.tied:
                    model["output_layer.weight"] = head.chunk(mesh.tp)[rank].clone()
            files.setdefault(chunk.pp, {})[f"model{chunk.vpp}" if split_up else "model"] = model
        for pp, content in files.items():
            directory = out / "release" / (f"mp_rank_{rank:02d}" + (f"_{pp:03d}" if mesh.pp > 1 else ""))
            directory.mkdir(parents=True)
            args = Namespace(num_layers=arch.num_layers)
            torch.save(
                {"args": args, "checkpoint_version": 3.0, "iteration": 0, **content}, directory / "model_optim_rng.pt"
            )
    (out / "latest_checkpointed_iteration.txt").write_text("release")
    return out


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Load a rank's file, let `change` work on its model, write it back."""
    content = torch.load(path, weights_only=False)
    change(content["model"])
    torch.save(content, path)
