"""Bytes on their way into one file."""

from __future__ import annotations

from collections.abc import Callable

from shardtool.execute import tiles as tiling
from shardtool.execute.checksum import crc32
from shardtool.execute.files import Files
from shardtool.execute.finite import Passing
from shardtool.execute.reflink import LEAST
from shardtool.execute.tiles import Workspace
from shardtool.formats.stored import BLOCK

Progress = Callable[[int, str], None]  # bytes of the target that are done, and the file

SLACK = 64 << 10  # room behind a tile for what follows a payload in its file


class Stream:
    """Bytes on their way into one file: gathered in a buffer, written in large pieces that end on multiples of it."""

    def __init__(self, space: Workspace, files: Files, name: str, progress: Progress | None) -> None:
        self._space, self._files, self._name, self._progress = space, files, name, progress
        self._tile = tiling.TILE_BYTES
        self._view = space.buffer("stream", self._tile + SLACK)
        self._base = self._fill = 0
        self._limit = self._tile
        self._crc, self._mark, self._checked = 0, 0, False
        self._passing: Passing | None = None
        self._payload = 0  # bytes of payload that are not yet reported

    def seek(self, offset: int) -> None:
        """The next bytes belong at this offset of the file."""
        if offset != self._base + self._fill:
            self.flush()
            self._base = offset
            self._limit = self._tile - offset % self._tile

    def begin(self, checked: bool, passing: Passing | None) -> None:
        """What follows is one tensor's payload, with a checksum or without, and looked at by `passing`."""
        self._crc, self._mark, self._checked, self._passing = 0, self._fill, checked, passing

    def end(self) -> int:
        """The checksum since `begin`."""
        self._see(self._view[self._mark : self._fill])
        self._checked, self._passing = False, None
        return self._crc

    def _see(self, data: memoryview) -> None:
        if len(data) and self._checked:
            self._crc = crc32(data, self._crc)
        if len(data) and self._passing is not None:
            self._passing.see(data)

    def read(self, file: str, offset: int, size: int) -> None:
        """Bytes of a source file."""
        while size:
            count = min(size, self._limit - self._fill)
            if count > 0:
                self._space.read_into(file, offset, self._view[self._fill : self._fill + count])
                self._advance(count)
                offset += count
                size -= count
            if self._fill >= self._limit:
                self.flush()

    def share(self, file: str, offset: int, size: int) -> None:
        """Bytes of a source file, whole blocks of them shared with it where they lie alike in both files."""
        if (self._base + self._fill - offset) % BLOCK or size < LEAST:
            self.read(file, offset, size)
            return
        lead = -offset % BLOCK
        blocks = (size - lead) // BLOCK * BLOCK
        self.read(file, offset, lead)
        self.flush()
        self._files.clone(self._name, self._space.descriptor(file), offset + lead, blocks, self._base)
        for at in range(0, blocks, self._tile) if self._checked or self._passing or self._files.hashes else ():
            view = self._view[: min(self._tile, blocks - at)]
            self._space.read_into(file, offset + lead + at, view)
            self._see(view)
            self._files.passed(self._name, view, self._base + at)
        self._base += blocks
        self._limit = self._tile - self._base % self._tile
        self._payload += blocks
        self._report()
        self.read(file, offset + lead + blocks, size - lead - blocks)

    def zeros(self, size: int) -> None:
        """Padding."""
        while size:
            count = min(size, self._limit - self._fill)
            if count > 0:
                self._view[self._fill : self._fill + count] = bytes(count)
                self._advance(count)
                size -= count
            if self._fill >= self._limit:
                self.flush()

    def _advance(self, count: int) -> None:
        self._fill += count
        self._payload += count

    def write(self, data: memoryview, offset: int) -> None:
        """Payload that is in a buffer of its own already."""
        self.flush()
        self._see(data)
        self._files.write(self._name, data, offset)
        self._base = offset + len(data)
        self._limit = self._tile - self._base % self._tile
        self._payload += len(data)
        self._report()

    def put(self, data: bytearray) -> None:
        """Bytes that are no payload."""
        if self._fill + len(data) > len(self._view):
            self.flush()
        if len(data) > len(self._view):
            self._files.write(self._name, data, self._base)
            self._base += len(data)
            self._limit = self._tile - self._base % self._tile
            return
        self._view[self._fill : self._fill + len(data)] = data
        self._fill += len(data)

    def flush(self) -> None:
        """Write what has gathered."""
        if self._fill:
            self._see(self._view[self._mark : self._fill])
            self._mark = 0
            self._files.write(self._name, self._view[: self._fill], self._base)
            self._base += self._fill
            self._fill = 0
            self._limit = self._tile - self._base % self._tile
        self._report()

    def _report(self) -> None:
        if self._progress and self._payload:
            self._progress(self._payload, self._name)
        self._payload = 0
