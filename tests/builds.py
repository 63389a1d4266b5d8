"""What transformers does not build into a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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
