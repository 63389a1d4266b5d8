"""What transformers does not build into a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# the linears that DeepSeek ships in FP8, by the last part of their names
FP8_LAST = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# rows and columns of a block: both are cut by tensor parallel edges and are ragged at the ends
FP8_BLOCK = (20, 28)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(FP8 matrix, inverse scales), block by block."""
    rows, columns = FP8_BLOCK
    scales = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    matrix = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[at].abs().max() / 448
            matrix[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return matrix, scales


def quantise(model: Path, out: Path) -> Path:
    """The directory of a tiny DeepSeek-V3 with its linears in FP8."""
    held: dict[str, torch.Tensor] = {}
    for name, value in load_file(model / "model.safetensors").items():
        if name.split(".")[-2] in FP8_LAST:
            held[name], held[name + "_scale_inv"] = quantised(value)
        else:
            held[name] = value
    form = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(FP8_BLOCK)}
    out.mkdir()
    save_file({name: value.contiguous() for name, value in held.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": form}))
    return out


def with_multi_token_prediction(model: Path) -> None:
    """Add the MTP layer that a DeepSeek config promises and transformers leaves out, embedding and head repeated in it.

    An expert layer under the next number, its own norms and projection, everything but the two aliases random.
    """
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    last, hidden = config["num_hidden_layers"], config["hidden_size"]
    at, generator = f"model.layers.{last}.", torch.Generator().manual_seed(1)
    added = {
        key.replace(f"model.layers.{last - 1}.", at): torch.randn(value.shape, generator=generator)
        for key, value in tensors.items()
        if key.startswith(f"model.layers.{last - 1}.")
    }
    added |= {at + name: torch.randn(hidden, generator=generator) for name in ("enorm.weight", "hnorm.weight")}
    added[at + "eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator)
    added[at + "shared_head.norm.weight"] = torch.randn(hidden, generator=generator)
    added[at + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    added[at + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | added, model / "model.safetensors", metadata={"format": "pt"})
