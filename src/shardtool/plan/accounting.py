"""Every element of the source is read, and every element of the target written, exactly once; else an error."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from math import prod

from shardtool.errors import BUG, CheckpointError
from shardtool.plan.copies import Plan


def check(made: Plan) -> None:
    """Raises CheckpointError naming the tensors, which would be a bug in a layout."""
    check_written(made)
    _check_read(made)


def check_written(made: Plan) -> None:
    """Every element of the target is written once: copies of one piece are disjoint, so it is enough to count."""
    written: dict[int, list[tuple[tuple[tuple[int, ...], ...], int]]] = defaultdict(list)
    for copy in made.copies:
        loops = {loop.axis: loop.ids for loop in copy.loops}
        volume = copy.volume
        for loop in copy.loops:
            if loop.dst_stride:
                volume *= len(loop.ids)
        written[id(copy.dst)].append((tuple([loops[name.axis] for name in copy.dst.names]), volume))
    for fill in made.fills:
        written[id(fill.piece)].append((tuple([name.ids for name in fill.piece.names]), fill.volume))
    problems = []
    for piece in made.dst.pieces:
        if piece.constant is not None:
            continue
        numel = prod(made.dst.shape(piece))
        parts = written[id(piece)]
        whole = tuple([name.ids for name in piece.names])
        if all(ids == whole for ids, _ in parts):
            totals = {whole: sum(volume for _, volume in parts)}
        else:
            totals = {tuple((i,) for i in ids): 0 for ids in piece.ids()}
            for ids, volume in parts:
                for one in product(*ids):
                    totals[tuple((i,) for i in one)] += volume
        for ids, total in totals.items():
            if total != numel:
                key = piece.key(tuple(group[0] for group in ids))
                problems.append(f"{key[1]} ({key[0] or made.dst.description}): {total} of {numel} elements")
    _refuse("elements of the target are not written exactly once", problems, made)


def _check_read(made: Plan) -> None:
    """Every logical element of the source's primary pieces is read once by the target's primary pieces."""
    read: dict[int, int] = defaultdict(int)
    for copy in made.copies:
        if not copy.dst.replica and 0 not in copy.src_strides[: len(copy.shape)]:
            read[id(copy.src)] += copy.volume * prod(len(loop.ids) for loop in copy.loops)
    dropped: dict[int, int] = defaultdict(int)
    for cut in made.cuts:
        dropped[id(cut.piece)] += cut.volume
    problems = []
    for piece in made.src.pieces:
        if piece.replica or piece.constant is not None:
            continue
        numel = prod(made.src.shape(piece)) * piece.instances - dropped[id(piece)]
        if read[id(piece)] != numel:
            problems.append(
                f"{piece.name} ({piece.file or made.src.description}): {read[id(piece)]} of {numel} elements"
            )
    _refuse("elements of the source are not read exactly once", problems, made)


def _refuse(what: str, problems: list[str], made: Plan) -> None:
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(
            what, where=f"{made.src.description} -> {made.dst.description}", details=tuple(shown), hint=BUG
        )
