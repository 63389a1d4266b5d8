"""Blocks shared with the source, where the file system can (XFS, Btrfs): FICLONERANGE takes no time and no space.

A block can be shared when it lies at the same place, modulo its size, in both files. So a target that is to share is
laid out for that: records of torch archives and the data of safetensors begin where their source does, modulo BLOCK.
"""

from __future__ import annotations

import fcntl
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path

from shardtool.errors import UsageError, reason
from shardtool.execute.lower import Task, moves, runs
from shardtool.formats.stored import BLOCK, ITEMSIZE, Stored
from shardtool.layout.layout import Key

LEAST = 64 << 10  # bytes of a run that is worth a call, and of the runs that say where a payload goes
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), include/uapi/linux/fs.h
_RANGE = struct.Struct("=qQQQ").pack


def residues(tasks: Iterable[Task], locate: Callable[[Key], Stored]) -> dict[Key, int]:
    """Where the payload of each target tensor begins, modulo BLOCK, so that most of its bytes can be shared.

    Only of tensors that consist of long runs of source bytes.
    """
    found: dict[Key, int] = {}
    for task in tasks:
        held, width = moves(task, locate), ITEMSIZE[task.dtype]
        places: Counter[int] = Counter()
        at = 0
        for number, start, size in runs(held, task.dtype, prod(task.shape), LEAST) or ():
            if number >= 0 and size >= LEAST:
                source = held[number].start + held[number].src_offset * width + start
                places[(source - at) % BLOCK] += size
            at += size
        if places:
            found[task.key] = places.most_common(1)[0][0]
    return found


def check(source: str, directory: Path) -> None:
    """UsageError where files in a directory cannot share blocks with a source file."""
    import tempfile  # noqa: PLC0415 - slow to import, and seldom needed

    with open(source, "rb") as file, tempfile.TemporaryFile(dir=directory) as target:  # noqa: PTH123 - no Path here
        clone(file.fileno(), 0, 0, target.fileno(), 0, str(directory))


def clone(source: int, offset: int, size: int, target: int, at: int, where: str) -> None:
    """Share `size` bytes at `offset` of a source file with a target file, at `at`; all are multiples of BLOCK.

    Size 0 means to the source's end. UsageError where the file system cannot.
    """
    try:
        fcntl.ioctl(target, _FICLONERANGE, _RANGE(source, offset, size, at))
    except OSError as error:
        raise UsageError(
            "blocks cannot be shared with the source",
            where=where,
            expected="source and target on one file system that shares blocks, such as XFS or Btrfs",
            found=reason(error),
            hint="leave out --reflink",
        ) from error
