"""Checkpoints that are spoiled on purpose, and the types of the fixtures that tests of bad input share."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from commands import Result

TinyModel = Callable[[str], Path]
Megatron = Callable[..., Path]
Refused = Callable[..., Result]
Copied = Callable[[Path], Path]
Meanwhile = Callable[[str, int, Callable[[], object]], None]
Tensors = dict[str, torch.Tensor]
Records = list[tuple[zipfile.ZipInfo, bytes]]
RANK_FILE = "model_optim_rng.pt"
NORM = "model.norm.weight"
CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "llama.json"


def edit(model: Path, change: Callable[[Tensors], object]) -> Path:
    """Change the tensors of a Hugging Face directory."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def edit_config(model: Path, **changes: object) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model


def edit_rank(checkpoint: Path, change: Callable[[dict[str, Any]], object], rank: str = "mp_rank_00") -> Path:
    """Change what a rank's file holds."""
    (path,) = checkpoint.glob(f"*/{rank}/{RANK_FILE}")
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    return checkpoint


def repack(path: Path, change: Callable[[Records], object], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(info, archive.read(info)) for info in archive.infolist()]
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for info, data in records:
            archive.writestr(info.filename, data)
