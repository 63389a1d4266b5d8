"""Which files a source is, so that a later run can tell whether it is still the same, and a manifest can name them.

A file of tensors is known by its size, its time of modification and the SHA-256 of its two ends (headers lie there);
small files that say what the tensors are, by the SHA-256 of all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from shardtool.checkpoint.opened import Opened
from shardtool.errors import CheckpointError, reason, unreadable
from shardtool.formats import hf_bin, safetensors_files
from shardtool.formats.torch_dist import METADATA
from shardtool.formats.tracker import TRACKER

END_BYTES = 64 << 10
# what is read whole, beside the files of tensors
DESCRIBING = ("config.json", safetensors_files.INDEX, hf_bin.INDEX, TRACKER, METADATA, "common.pt", "metadata.json")


class SourceFile(Struct, frozen=True):
    """One file: its name below the source, its bytes, and the SHA-256 of all of it (`whole`) or of its two ends."""

    name: str
    size: int
    mtime_ns: int
    sha256: str
    whole: bool


class Identity(Struct, frozen=True):
    """The files of a source, as they were when it was opened."""

    path: Path
    files: tuple[SourceFile, ...]

    def key(self) -> list[Any]:
        """All that tells this source, in this place and state, from another."""
        files = [[file.name, file.size, file.mtime_ns, file.sha256] for file in self.files]
        return [str(self.path.resolve()), files]

    def as_dict(self) -> dict[str, Any]:
        """For a manifest: nothing that differs between two copies of the same source."""
        files = {
            file.name: {"size": file.size, "sha256" if file.whole else "ends_sha256": file.sha256}
            for file in self.files
        }
        return {"path": str(self.path), "files": files}

    def check_unchanged(self) -> None:
        """Raises CheckpointError when a file has another size or time than before, or is gone."""
        for file in self.files:
            path = self.path / file.name
            found = _stat(path)
            if (found.st_size, found.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(
                    "the source changed during the conversion",
                    where=str(path),
                    expected=f"{file.size} bytes, last changed at {file.mtime_ns / 1e9:.3f}",
                    found=f"{found.st_size} bytes, last changed at {found.st_mtime_ns / 1e9:.3f}",
                    hint="give the same command again when nothing writes to the source any more",
                )


def identify(source: Opened) -> Identity:
    """The files that a source's tensors and their description come from. CheckpointError where one cannot be read."""
    tensors = dict.fromkeys(_tensor_files(source))
    directories = dict.fromkeys([source.path, *(Path(file).parent for file in tensors)])
    describing = [directory / name for directory in directories for name in DESCRIBING]
    found = [_identify(source.path, path, whole=True) for path in describing if path.is_file()]
    found += [_identify(source.path, Path(file), whole=False) for file in tensors]
    return Identity(source.path, tuple(sorted(found, key=lambda file: file.name)))


def _tensor_files(source: Opened) -> Iterator[str]:
    for key in source.headers:
        yield source.place(key)[0] if source.place is not None else source.locate(key).file


def _identify(root: Path, path: Path, *, whole: bool) -> SourceFile:
    name = os.path.relpath(path, root)
    found = _stat(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            if whole or found.st_size <= 2 * END_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(END_BYTES))
                file.seek(-END_BYTES, os.SEEK_END)
                digest.update(file.read(END_BYTES))
    except OSError as error:
        raise _gone(path, error) from error
    return SourceFile(name, found.st_size, found.st_mtime_ns, digest.hexdigest(), whole)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _gone(path, error) from error


def _gone(path: Path, error: OSError) -> CheckpointError:
    return unreadable(str(path), reason(error))
