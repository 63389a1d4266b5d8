"""Faults planted in per-rank checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def contents(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The content of each rank's file; what the loop's body changes is saved."""
    for path in sorted(checkpoint.glob("*/mp_rank_*/model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        yield content
        torch.save(content, path)


def edit_tensors(checkpoint: Path, ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change every tensor whose name ends so; at least one must be there, and must change."""
    changed = 0
    for content in contents(checkpoint):
        for model in (value for key, value in content.items() if key.startswith("model")):
            for name in [name for name in model if name.endswith(ending)]:
                before, model[name] = model[name], change(model[name]).contiguous()
                changed += not torch.equal(before, model[name])
    assert changed, f"no tensor {ending} was changed"


def edit_args(checkpoint: Path, **changes: object) -> None:
    """Change entries of the args in all ranks; each must be there with another value."""
    for content in contents(checkpoint):
        assert isinstance(content["args"], Namespace)
        for name, value in changes.items():
            assert getattr(content["args"], name) != value, f"{name} is {value} already"
            setattr(content["args"], name, value)
