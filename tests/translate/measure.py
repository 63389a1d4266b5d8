"""Logits of Hugging Face directories, and how far two of them are apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENS = 24


def prompts(vocab: int, tokens: int = TOKENS) -> Tensor:
    """Two rows of random tokens."""
    return torch.randint(0, vocab, (2, tokens), generator=torch.Generator().manual_seed(0))


def logits(directory: Path, dtype: torch.dtype, tokens: int = TOKENS) -> Tensor:
    """What transformers computes."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    for weight in model.parameters():
        # where a mapped tensor lies in its file decides how a matrix product sums; bits are compared here
        weight.data = weight.data.clone()
    with torch.no_grad():
        return model(prompts(model.config.vocab_size, tokens)).logits


def ratio(ours: Tensor, theirs: Tensor) -> float:
    """max |delta logit| / std(logits)."""
    return ((ours.float() - theirs.float()).abs().max() / ours.float().std()).item()


def typical(ours: Tensor, theirs: Tensor) -> float:
    """The same of the median position: where a router rounds, single tokens may get another expert."""
    apart = (ours.float() - theirs.float()).abs().amax(-1).flatten()
    return (apart.median() / ours.float().std()).item()


def edit_config(directory: Path, **changes: object) -> None:
    """Change a config.json in place."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a one-file directory in place."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt"})


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a one-file directory."""
    return load_file(directory / "model.safetensors")


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )
