"""Small files of a checkpoint, read whole: configs, indices, metadata, trackers.

A checkpoint is a directory that somebody else has made. A pipe in the place of a file would block, a device would never
end, a huge file would fill the memory, and a link would lead to a file that has no business in a checkpoint.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardtool.errors import CheckpointError

CONFIG_BYTES = 16 << 20  # config.json and its like
INDEX_BYTES = 256 << 20  # an index has a line per tensor
METADATA_BYTES = 2 << 30  # torch_dist's .metadata has some 300 bytes per chunk of a tensor


def open_file(path: str | Path, where: str | None = None) -> int:
    """A descriptor to read a plain file with. CheckpointError where it is none, or cannot be opened."""
    where = str(path) if where is None else where
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError("a file cannot be opened", where=where, found=found) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        found = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise CheckpointError("a file cannot be read", where=where, expected="a plain file", found=found)
    return descriptor


def read_small(path: str | Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes. Raises CheckpointError."""
    descriptor = open_file(path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            # no more than there is: read(n) allocates n bytes before it looks
            data = file.read(min(limit, os.fstat(descriptor).st_size) + 1)
        except OSError as error:
            raise CheckpointError("a file cannot be read", where=str(path), found=error.strerror) from None
    if len(data) > limit:
        raise CheckpointError(
            "a file is too large for what it is", where=str(path), expected=f"at most {limit} bytes",
            found=f"{Path(path).stat().st_size} bytes",
        )  # fmt: skip
    return data
