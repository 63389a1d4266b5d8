"""Tensors that are one number: what fills them in a target, and the check that a source's are that number."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from shardtool.checkpoint.opened import Opened, fold
from shardtool.checkpoint.target import Target
from shardtool.errors import CheckpointError
from shardtool.execute.codecs import Values, read_values
from shardtool.execute.numbers import numpy, numpy_dtype
from shardtool.execute.tiles import Workspace
from shardtool.formats.stored import Stored
from shardtool.layout.layout import Key
from shardtool.plan.copies import Plan

STEP = 1 << 18  # elements that are looked at together


def constant_fills(plan: Plan, target: Target) -> dict[Key, bytes]:
    """The bytes of one element of every constant tensor to be written that is not zero."""
    found = {}
    for piece in plan.dst.pieces:
        if piece.constant:
            for key in piece.all_keys():
                kind = numpy_dtype(target.payload(key)[1].dtype, values=True)
                found[key] = numpy().asarray(piece.constant).astype(kind).tobytes()
    return found


def broken_constants(source: Opened) -> list[str]:
    """The tensors of a source that ought to be one number and are not, a line each, folded over layers."""
    lines = []
    space = Workspace()
    try:
        for piece in source.layout.pieces:
            if piece.constant is not None:
                for key in piece.all_keys():
                    stored = source.locate(key)
                    if any((part != piece.constant).any() for part in _elements(space, stored)):
                        lines.append(f"{key[1]} is not {piece.constant:g} everywhere")
    finally:
        space.close()
    return fold(lines)


def check_constants(source: Opened) -> None:
    """CheckpointError naming the tensors that Megatron has no place for and that are not the number that they must be."""
    if broken := broken_constants(source):
        raise CheckpointError(
            "tensors that megatron-core has no place for are not zero",
            where=str(source.path),
            expected="zeros: megatron-core has biases on all linears of a layer, or on q, k and v alone",
            found=f"{len(broken)} that are not",
            details=tuple(broken[:20]),
            hint="this model cannot be expressed in megatron-core: its output biases do something",
        )


def _elements(space: Workspace, stored: Stored) -> Iterator[Any]:
    total = prod(stored.shape)
    for low in range(0, total, STEP):
        yield read_values(Values(stored, None), low, min(STEP, total - low), space.read)
