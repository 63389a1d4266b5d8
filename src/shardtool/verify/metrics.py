"""How far two sets of logits are apart. All sums in fp64, over a few rows at a time: logits can be gigabytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from msgspec import Struct

from shardtool.verify.outputs import Outputs, point_name, position_name
from shardtool.verify.report import Distance

ROWS = 128  # logits rows at a time; the fp64 copies of 128 rows of 128k tokens are 400 MB in all


class _Sums(Struct):
    """What adds up over the rows."""

    rows: int = 0
    total: float = 0.0
    square: float = 0.0
    decisive: float = -1.0  # the largest gap, in units of the row's bound where there are bounds
    max_abs: float = -1.0  # the gap there
    bound: float = math.nan
    largest: float = 0.0
    worst: tuple[int, int] = (0, 0)  # row, token
    kl_max: float = -math.inf
    kl_sum: float = 0.0
    same_top: int = 0

    def add(self, a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor | None) -> None:
        """Take in the next rows of both sides, fp64 [rows, vocabulary]; `bounds` [rows] is how far apart each may be."""
        gaps, tokens = (a - b).abs().max(dim=1)
        weights = gaps if bounds is None else gaps / bounds
        row = int(weights.argmax())
        if float(weights[row]) > self.decisive:
            self.decisive, self.max_abs = float(weights[row]), float(gaps[row])
            self.bound = math.nan if bounds is None else float(bounds[row])
            self.worst = (self.rows + row, int(tokens[row]))
        self.largest = max(self.largest, float(gaps.max()))
        self.total += float(a.sum())
        self.square += float(a.square().sum())
        log_p, log_q = a.log_softmax(dim=1), b.log_softmax(dim=1)
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        self.kl_max, self.kl_sum = max(self.kl_max, float(kl.max())), self.kl_sum + float(kl.sum())
        self.same_top += int((a.argmax(dim=1) == b.argmax(dim=1)).sum())
        self.rows += a.shape[0]


def distance(
    a: Outputs,
    b: Outputs,
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    bounds: torch.Tensor | None = None,
) -> tuple[Distance, tuple[str, ...]]:
    """Compare the first `vocab_size` columns of all rows, and the hidden states point by point. Also what is wrong:

    a NaN or infinity on either side, a wrong number of rows or tokens, logits that are all the same, nothing at all.
    With `bounds` [rows] the row that decides is the one that is farthest beyond its own bound.
    """
    problems = _shape_problems(a, b, prompts, vocab_size)
    if problems:
        return Distance(), tuple(problems)
    sums = _Sums()
    for start in range(0, a.logits.shape[0], ROWS):
        left, right = (side.logits[start : start + ROWS, :vocab_size].double() for side in (a, b))
        for name, part in (("a", left), ("b", right)):
            if bool((bad := ~part.isfinite().all(dim=1)).any()):
                where = position_name(start + int(bad.nonzero()[0]), prompts)
                return Distance(a.logits.shape[0], vocab_size, layers=layers(a, b)), (
                    f"NaN or infinite logits on side {name}, first at {where}",
                )
        sums.add(left, right, None if bounds is None else bounds[start : start + ROWS].double())
    count = sums.rows * vocab_size
    found = Distance(
        positions=sums.rows,
        vocab_size=vocab_size,
        max_abs=sums.max_abs,
        bound=sums.bound,
        largest=sums.largest,
        std=math.sqrt(max(sums.square / count - (sums.total / count) ** 2, 0.0)),
        worst=f"{position_name(sums.worst[0], prompts)} token {sums.worst[1]}",
        kl_max=sums.kl_max,
        kl_mean=sums.kl_sum / sums.rows,
        top1=sums.same_top / sums.rows,
        layers=layers(a, b),
    )
    constant = f"all logits of side a are {sums.total / count:g}: nothing was compared"
    return found, () if found.std > 0 else (constant,)


def row_gaps(a: Outputs, b: Outputs, vocab_size: int) -> torch.Tensor:
    """max |a - b| of every row [rows]; NaN where one of them is none."""
    parts = []
    for start in range(0, a.logits.shape[0], ROWS):
        left, right = (side.logits[start : start + ROWS, :vocab_size] for side in (a, b))
        parts.append((left - right).abs().amax(dim=1))
    return torch.cat(parts)


def _shape_problems(a: Outputs, b: Outputs, prompts: Sequence[Sequence[int]], vocab_size: int) -> list[str]:
    rows = sum(map(len, prompts))
    problems = []
    for name, side in (("a", a), ("b", b)):
        if side.logits.shape[0] != rows:
            problems.append(f"side {name} gave {side.logits.shape[0]} rows of logits for {rows} positions")
        if side.logits.shape[1] < vocab_size:
            problems.append(f"side {name} has {side.logits.shape[1]} tokens, fewer than {vocab_size}")
    if rows == 0 or vocab_size == 0:
        problems.append("nothing was compared")
    return problems


def layers(a: Outputs, b: Outputs) -> tuple[float, ...]:
    """The largest relative L2 distance of a traced position's hidden state, per point; empty where they do not pair up.

    Relative to the norm of the state, not to its spread: a few channels of trained models are a thousand times larger
    than the rest, and their rounding errors with them.
    """
    if a.hidden.shape != b.hidden.shape:
        return ()
    result = []
    for left, right in zip(a.hidden, b.hidden, strict=True):
        norm = left.double().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        result.append(float(((left.double() - right.double()).norm(dim=1) / norm).max()))
    return tuple(result)


def first_diverging(distances: Sequence[float], threshold: float) -> str | None:
    """The first traced point whose distance is above the threshold, or not a number."""
    for point, value in enumerate(distances):
        if not value <= threshold:
            return point_name(point, len(distances))
    return None
