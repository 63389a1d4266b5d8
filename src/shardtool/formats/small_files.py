"""Small files of a checkpoint, read whole: configs, indices, metadata, trackers.

A checkpoint is a directory that somebody else has made. A pipe in the place of a file would block, a device would never
end, a huge file would fill the memory, and a link would lead to a file that has no business in a checkpoint.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardtool.errors import CheckpointError, reason, unreadable

CONFIG_BYTES = 16 << 20  # config.json and its like
INDEX_BYTES = 256 << 20  # an index has a line per tensor
METADATA_BYTES = 2 << 30  # torch_dist's .metadata has some 300 bytes per chunk of a tensor


def open_file(path: str | Path, where: str | None = None) -> int:
    """A descriptor to read a plain file with. CheckpointError where it is none, or cannot be opened."""
    where = str(path) if where is None else where
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise unreadable(where, reason(error)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise no_plain_file(where, kind_of(mode))
    return descriptor


def no_plain_file(where: str, found: str) -> CheckpointError:
    """Something else in the place of a file."""
    return CheckpointError(
        "something else lies in the place of a file", where=where, expected="a plain file", found=found,
        hint="do not use this checkpoint before you know why: no tool saves one like that",
    )  # fmt: skip


def kind_of(mode: int) -> str:
    """What something is that is no plain file."""
    return "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


def read_small(path: str | Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes. Raises CheckpointError."""
    descriptor = open_file(path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            # no more than the file has: the buffer is made before anything is read
            data = file.read(min(limit, os.fstat(descriptor).st_size) + 1)
        except OSError as error:
            raise unreadable(str(path), reason(error)) from error
    if len(data) > limit:
        raise CheckpointError(
            "a file is too large for what it is", where=str(path), expected=f"at most {limit} bytes",
            found=f"{Path(path).stat().st_size} bytes", hint="this is not what its name says: look at its beginning",
        )  # fmt: skip
    return data
