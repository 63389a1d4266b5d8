"""The engine: a plan and two sets of byte places become files, or a comparison.

A target tensor is assembled tile by tile in a reused buffer from range reads of the sources and leaves it in one write
(or is compared with what a file holds). Memory is workers x a few tiles, whatever the size of the model. No torch.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from shardtool.errors import CheckpointError
from shardtool.execute.tiles import Move, Workspace, clip, coalesce, fill_tile, numpy_dtype, tiles
from shardtool.formats.stored import Payload, Skeleton, Stored, row_major_strides
from shardtool.layout.layout import Key, Piece
from shardtool.plan.plan import Copy, Plan

Progress = Callable[[int, str], None]  # bytes of the target that are done, and the file


@dataclass(frozen=True, slots=True)
class Task:
    """One target tensor: how its elements are made, and in which elements (row ranges) the padding value stands."""

    key: Key
    piece: Piece
    shape: tuple[int, ...]
    dtype: str
    copies: tuple[tuple[Copy, tuple[int, ...]], ...]  # with the ids of the target's name axes


def tasks(plan: Plan, dtype_of: Callable[[Key], str]) -> Iterator[Task]:
    """One task per target tensor, in the layout's order, expanded lazily."""
    by_piece: dict[int, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        by_piece[id(copy.dst)].append(copy)
    for piece in plan.dst.pieces:
        shape = plan.dst.shape(piece)
        held = [(copy, _ids_of(copy)) for copy in by_piece[id(piece)]]
        for ids in piece.ids():
            key = piece.key(ids)
            copies = tuple((c, ids) for c, sets in held if all(i in s for i, s in zip(ids, sets, strict=True)))
            yield Task(key, piece, shape, dtype_of(key), copies)


def _ids_of(copy: Copy) -> tuple[frozenset[int], ...]:
    loops = {loop.axis: frozenset(loop.ids) for loop in copy.loops}
    return tuple(loops[name.axis] for name in copy.dst.names)


def moves(task: Task, locate: Callable[[Key], Stored]) -> list[Move]:
    """The strided copies of a task with their sources found."""
    found = []
    for copy, ids in task.copies:
        fixed = {name.axis: index for name, index in zip(copy.dst.names, ids, strict=True)}
        for chosen in product(*((fixed[loop.axis],) if loop.axis in fixed else loop.ids for loop in copy.loops)):
            index = {loop.axis: i for loop, i in zip(copy.loops, chosen, strict=True)}
            stored = locate(copy.src.key(tuple(index[name.axis] for name in copy.src.names)))
            src = copy.src_offset + sum(index[loop.axis] * loop.src_stride for loop in copy.loops)
            dst = copy.dst_offset + sum(index[loop.axis] * loop.dst_stride for loop in copy.loops)
            move = Move(
                stored.file, stored.offset, stored.dtype, copy.shape, src, copy.src_strides, dst, copy.dst_strides
            )
            found.append(coalesce(move if stored.strides is None else _restride(move, stored)))
    return found


def _restride(move: Move, stored: Stored) -> Move:
    """A copy from a tensor that is not stored row-major: each stride belongs to one dim, which has another stride."""
    rows, real = row_major_strides(stored.shape), stored.strides or ()
    dims = [(row, step) for row, step, size in zip(rows, real, stored.shape, strict=True) if size > 1]

    def translate(address: int) -> int:
        total = 0
        for row, step in dims:
            count, address = divmod(address, row)
            total += count * step
        return total

    return replace(
        move, src_offset=translate(move.src_offset), src_strides=tuple(translate(stride) for stride in move.src_strides)
    )


class Files:
    """The target files of a run: opened once, sized, with their skeletons written; payload goes to known places."""

    def __init__(self, directory: Path, skeletons: Mapping[str, Skeleton]) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        for name, skeleton in skeletons.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._descriptors[name] = descriptor
            if skeleton.size:
                _allocate(descriptor, skeleton.size)
            for offset, data in skeleton.parts:
                _write(descriptor, data, offset)

    def write(self, name: str, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at an offset of a file."""
        _write(self._descriptors[name], data, offset)

    def close(self, *, sync: bool) -> None:
        """Close all files, after fsync where `sync`."""
        for descriptor in self._descriptors.values():
            if sync:
                os.fsync(descriptor)
            os.close(descriptor)
        self._descriptors.clear()


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:  # not every file system can reserve; a hole reads as zeros all the same
        os.ftruncate(descriptor, size)


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def write(
    work: Sequence[tuple[Task, str, Payload]],
    files: Files,
    locate: Callable[[Key], Stored],
    *,
    fills: Mapping[Key, bytes] | None = None,
    jobs: int = 2,
    progress: Progress | None = None,
) -> int:
    """Assemble every task's tensor and write it to its payload's place; the bytes written.

    `fills` gives the bytes of one padding row of a tensor where padding is not zeros.
    """
    lock = threading.Lock()
    local = threading.local()
    spaces: list[Workspace] = []
    total = 0

    def one(task: Task, file: str, payload: Payload) -> None:
        nonlocal total
        space = getattr(local, "space", None)
        if space is None:
            space = local.space = Workspace()
            with lock:
                spaces.append(space)
        crc, width = 0, numpy_dtype(payload.dtype, values=False).itemsize
        row = (fills or {}).get(task.key)
        for low, data in assemble(space, task, locate, row):
            files.write(file, memoryview(data), payload.offset + low * width)
            if payload.crc_at:
                crc = zlib.crc32(data, crc)
            if progress:
                progress(len(data), file)
        for at in payload.crc_at:
            files.write(file, crc.to_bytes(4, "little"), at)
        with lock:
            total += payload.nbytes

    try:
        _run(jobs, one, work)
    finally:
        for space in spaces:
            space.close()
    return total


def _run(jobs: int, one: Callable[..., None], work: Iterable[tuple[Any, ...]]) -> None:
    """Run tasks on threads; the first error stops the run and is raised."""
    if jobs <= 1:
        for item in work:
            one(*item)
        return
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, *item) for item in work]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def assemble(
    space: Workspace, task: Task, locate: Callable[[Key], Stored], padding_row: bytes | None = None
) -> Iterator[tuple[int, Any]]:
    """The tiles of a task's tensor: (first element, bytes). A tile is valid until the next one is asked for."""
    dtype = task.dtype
    width = numpy_dtype(dtype, values=False).itemsize
    sources = moves(task, locate)
    numel = prod(task.shape)
    for low, high in tiles(numel, width):
        tile = space.buffer("tile", (high - low) * width)
        covered = sum(_overlap(move, low, high) for move in sources) >= high - low
        if not covered:
            _pad(tile, low, width, padding_row)
        fill_tile(space, sources, tile, low, dtype)
        yield low, tile


def _overlap(move: Move, low: int, high: int) -> int:
    """The elements of a dense copy in a range; 0 where it is strided in the target (then padding is laid first)."""
    span = 1 + sum((n - 1) * s for n, s in zip(move.shape, move.dst_strides, strict=True))
    if span != prod(move.shape):
        return 0
    return max(0, min(high, move.dst_offset + span) - max(low, move.dst_offset))


def _pad(tile: Any, low: int, width: int, row: bytes | None) -> None:
    if row is None:
        tile[:] = 0
        return
    pattern = np.frombuffer(row, np.uint8)
    start = low * width % len(pattern)
    repeated = np.tile(pattern, -(-(len(tile) + start) // len(pattern)))
    tile[:] = repeated[start : start + len(tile)]


@dataclass(frozen=True, slots=True)
class Difference:
    """A target tensor that is not what the plan makes it: how many elements differ, and the first."""

    key: Key
    elements: int
    first: int
    total: int


def compare(
    plan: Plan,
    locate: Callable[[Key], Stored],
    held: Callable[[Key], Stored],
    *,
    progress: Progress | None = None,
) -> tuple[int, list[Difference]]:
    """Execute a plan as a comparison: (elements compared, the tensors that differ). Padding is not compared.

    Bits are compared, after conversion where the target has another dtype.
    """
    compared, differences = 0, []
    space, other = Workspace(), Workspace()
    try:
        for task in tasks(plan, lambda key: held(key).dtype):
            target = held(task.key)
            if target.strides is not None:
                raise CheckpointError("a tensor to compare with is not contiguous", where=task.key[1])
            width = numpy_dtype(target.dtype, values=False).itemsize
            sources = moves(task, locate)
            bad = first = count = 0
            for low, tile in assemble(space, task, locate):
                theirs = other.buffer("tile", len(tile))
                other.read_into(target.file, target.offset + low * width, memoryview(theirs))
                mask = _written(sources, low, len(tile) // width)
                unequal = (tile.view(f"u{width}") != theirs.view(f"u{width}")) & mask
                count += int(mask.sum())
                found = int(unequal.sum())
                if found and not bad:
                    first = low + int(unequal.argmax())
                bad += found
                if progress:
                    progress(len(tile), task.key[0])
            compared += count
            if bad:
                differences.append(Difference(task.key, bad, first, count))
    finally:
        space.close()
        other.close()
    return compared, differences


def _written(sources: Sequence[Move], low: int, count: int) -> Any:
    """Which elements of a tile the copies write (the others are padding)."""
    mask = np.zeros(count, bool)
    for move in sources:
        for part in clip(move, low, low + count):
            start = part.dst_offset - low
            np.lib.stride_tricks.as_strided(mask[start:], part.shape, part.dst_strides)[...] = True
    return mask
