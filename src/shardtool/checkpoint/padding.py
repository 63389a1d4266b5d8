"""Rows of the padded vocabulary: what fills them on the way in, what is said about them on the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardtool.checkpoint.opened import Opened
from shardtool.execute import engine
from shardtool.execute.codecs import apply, change
from shardtool.execute.numbers import numpy_dtype
from shardtool.execute.tiles import Workspace
from shardtool.formats.stored import ITEMSIZE, Payload
from shardtool.layout.layout import Key
from shardtool.plan.copies import Plan


def padding_rows(plan: Plan, source: Opened, work: Sequence[tuple[engine.Task, str, Payload]]) -> dict[Key, bytes]:
    """The bytes of one padding row per target tensor, where padding is the mean of the vocabulary's rows."""
    if plan.pad != "mean" or not plan.fills:
        return {}
    import numpy as np  # noqa: PLC0415 - only where there is padding to look at

    padded = {id(fill.piece) for fill in plan.fills}
    rules = {fill.piece.rule for fill in plan.fills}
    space, rows = Workspace(), {}
    try:
        for rule in rules:
            held = [(task, payload) for task, _, payload in work if task.piece.rule == rule and not task.piece.replica]
            total, count = np.zeros(held[0][0].shape[1], np.float64), 0
            for task, _ in held:
                real = sum(part.copy.volume for part in task.sources) // task.shape[1]
                total += _row_sum(space, task, source, real)
                count += real
            mean = (total / count).astype(np.float32)
            for task, _, payload in work:
                if task.piece.rule == rule and id(task.piece) in padded:
                    changed = change(held[0][0].piece.codec, task.piece.codec)
                    row = mean if changed is None else apply(changed, mean, len(mean), task.dtype)
                    rows[task.key] = row.astype(numpy_dtype(payload.dtype, values=True)).tobytes()
    finally:
        space.close()
    return rows


def _row_sum(space: Workspace, task: engine.Task, source: Opened, real: int) -> Any:
    """The sum of the first `real` rows of a task's tensor, in float64."""
    import numpy as np  # noqa: PLC0415 - only where there is padding to look at

    width = task.shape[1]
    total = np.zeros(width, np.float64)
    for low, tile in engine.assemble(space, task, engine.moves(task, source.locate)):
        values = np.frombuffer(tile, numpy_dtype(task.dtype, values=True)).astype(np.float64)
        flat = np.arange(low, low + len(values))
        keep = flat < real * width
        np.add.at(total, flat[keep] % width, values[keep])
    return total


def cut_rows(plan: Plan, source: Opened) -> tuple[str, ...]:
    """What is to be said of the source's padding rows that are not exported: only where they are not what padding is.

    Padding is zeros or a repeat of one row; trained padding rows are neither, and dropping them loses something.
    """
    seen: dict[str, list[Any]] = {}  # by name: rows, the first of them, whether all are zeros, whether all are alike
    space = Workspace()
    try:
        for cut in plan.cuts:
            if cut.piece.replica or len(cut.shape) != 2:
                continue
            stored = source.locate(cut.piece.key(()))
            width = ITEMSIZE[stored.dtype]
            size = cut.shape[1] * width
            for number in range(cut.shape[0]):
                row = space.buffer("span", size)
                space.read_into(stored.file, stored.offset + cut.offset * width + number * size, row)
                found = seen.setdefault(cut.piece.name, [0, bytes(row), True, True])
                found[0] += 1
                found[2] = found[2] and _equal(row, bytes(size), stored.dtype)
                found[3] = found[3] and _equal(row, found[1], stored.dtype)
    finally:
        space.close()
    return tuple(
        f"{count} padding rows of {name} were cut that are neither zeros nor a repeat of one row"
        for name, (count, _, zeros, alike) in seen.items()
        if not zeros and not alike
    )


def _equal(row: memoryview, other: bytes, dtype: str) -> bool:
    """Whether two rows have the same values: the same bytes, or zeros of another sign."""
    if bytes(row) == other:
        return True
    import numpy as np  # noqa: PLC0415 - rows of padding are the same bytes

    ours, theirs = (np.frombuffer(data, numpy_dtype(dtype, values=True)) for data in (row, other))
    return bool((ours == theirs).all())
