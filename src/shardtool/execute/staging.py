"""All or nothing: output is made in a sibling directory, synced, and renamed once."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardtool.errors import UsageError


def check_destination(src: Path, dst: Path, *, overwrite: bool) -> None:
    """Raises UsageError when DST is inside SRC or contains it, or exists (without --overwrite, or as no directory)."""
    source, target = src.resolve(), dst.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        raise UsageError(
            "the target and the source overlap",
            where=str(dst),
            expected=f"a directory outside {src}",
            hint="choose another DST",
        )
    if dst.exists() or dst.is_symlink():
        if not overwrite:
            raise UsageError("the target exists", where=str(dst), hint="choose another DST, or give --overwrite")
        if not dst.is_dir() or dst.is_symlink():
            raise UsageError("the target is not a directory", where=str(dst), hint="choose another DST")


@contextmanager
def staged(dst: Path) -> Iterator[Path]:
    """A directory beside `dst` that becomes `dst` when the block ends well, and is removed when it does not.

    A `dst` that exists is put aside first and removed last, so that one of the two is always whole.
    """
    parent = dst.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        mark = uuid.uuid4().hex[:8]
        stage = parent / f".{dst.name}.shardtool-{mark}"
        stage.mkdir()
    except OSError as error:
        raise UsageError("the target cannot be made", where=str(dst), found=str(error)) from error
    try:
        yield stage
        _sync_tree(stage)
        aside = parent / f".{dst.name}.replaced-{mark}"
        if dst.exists():
            dst.rename(aside)
        try:
            stage.rename(dst)
        except OSError:
            if aside.exists():
                aside.rename(dst)
            raise
        _sync(parent)
        if aside.exists():
            shutil.rmtree(aside)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def write_small(path: Path, data: bytes) -> None:
    """Write a small file and sync it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_tree(directory: Path) -> None:
    for root, _, _ in os.walk(directory):
        _sync(Path(root))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
