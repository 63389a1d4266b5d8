"""What running a model on prompts gives, whichever library ran it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec import Struct


class Outputs(Struct, frozen=True):
    """`logits` [positions of all prompts, vocabulary] and `hidden` [points, traced positions of all prompts, hidden].

    Both fp32 on the CPU, whatever dtype computed them. Points are the embedding, the output of each layer but the last,
    and the final norm. `experts` [expert layers, experts]: whether some token was sent there, where that is known.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    experts: torch.Tensor | None = None


def point_name(point: int, points: int) -> str:
    """What a traced point is, for people. Layers count from 0, as in key names."""
    if point == 0:
        return "embedding"
    return "final norm" if point == points - 1 else f"layer {point - 1}"


def position_name(row: int, prompts: Sequence[Sequence[int]]) -> str:
    """Which prompt and position a row of the logits is."""
    for index, prompt in enumerate(prompts):
        if row < len(prompt):
            return f"prompt {index} position {row}"
        row -= len(prompt)
    return f"row {row} after the last prompt"
