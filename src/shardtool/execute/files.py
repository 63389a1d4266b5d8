"""The target files of a run: sized and headed first, written at known places, synced while others are still written."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import resource
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from shardtool.execute import reflink
from shardtool.execute.digests import Digests, FileDigest
from shardtool.formats.stored import Skeleton

# Bytes of one write, as large as the largest folio of the page cache: each has its costs (a lock of the file, the
# lookup of its blocks), which at 512 KiB were up to a sixth of a conversion (ext4, Linux 6.18).
WRITE_BYTES = 2 << 20
OPEN_FILES = 512  # descriptors that are kept; the others are opened again when they are needed
_PAGE = 4096
_WRITE_OUT = 2  # SYNC_FILE_RANGE_WRITE: start writing dirty pages, wait for nothing
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate", None)  # Linux only, as the next
_sync_file_range = getattr(_libc, "sync_file_range", None)


class Finished(Struct, frozen=True):
    """A target file that is complete: its size, its time of modification, and its digests where they were asked for."""

    name: str
    size: int
    mtime_ns: int
    digest: FileDigest | None


class Files:
    """Target files with their skeletons. The first part of a skeleton is written at once, the others with the payload
    that they follow, or at the end. With `durable` a file is synced as soon as it is complete, by a thread of its own.

    `digests` sees every byte that is written. `finished` is told of each file that is complete (with `durable`: on the
    device), by any thread. With `share` blocks may be shared with sources, so none are reserved.
    """

    def __init__(
        self,
        directory: Path,
        skeletons: Mapping[str, Skeleton],
        *,
        durable: bool = True,
        digests: Digests | None = None,
        finished: Callable[[Finished], None] | None = None,
        share: bool = False,
    ) -> None:
        self._directory = directory
        self._digests = digests
        self._finished = finished
        self.shares = share
        self._sizes = {name: skeleton.size for name, skeleton in skeletons.items()}
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._handed: dict[str, int] = {}  # of files that are complete, until they are synced and hashed
        self._held: dict[str, _Parts] = {}
        self._last: dict[str, tuple[int, bytes | bytearray]] = {}
        self._sync = _Sync(self._complete) if durable else None
        _allow_open_files()
        try:
            for name, skeleton in skeletons.items():
                self._make(name, skeleton)
        except BaseException:
            self.close(sync=False)
            raise

    def _make(self, name: str, skeleton: Skeleton) -> None:
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if skeleton.size and self.shares:
                os.ftruncate(descriptor, skeleton.size)
            elif skeleton.size:
                _allocate(descriptor, skeleton.size)
            held = _Parts(skeleton.parts)
            if first := held.take(0):
                self._put(name, descriptor, first, 0)
        except BaseException:
            os.close(descriptor)
            raise
        if last := held.take_last():
            self._last[name] = last
        self._held[name] = held
        if len(self._descriptors) < OPEN_FILES:
            self._descriptors[name] = descriptor
        else:
            os.close(descriptor)

    def _descriptor(self, name: str) -> int:
        found = self._descriptors.get(name)
        if found is None:
            with self._lock:
                found = self._descriptors.get(name)
                if found is None:
                    found = self._descriptors[name] = os.open(self._directory / name, os.O_RDWR)
        return found

    def write(self, name: str, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write bytes at an offset of a file."""
        self._put(name, self._descriptor(name), data, offset)

    def _put(self, name: str, descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        _write(descriptor, data, offset)
        if self._digests is not None:
            self._digests.passed(name, descriptor, offset, data)

    def write_both(self, name: str, data: memoryview, more: bytearray, offset: int) -> None:
        """Write bytes at an offset of a file, and more behind them."""
        descriptor = self._descriptor(name)
        if len(data) > WRITE_BYTES or os.pwritev(descriptor, (data, more), offset) < len(data) + len(more):
            _write(descriptor, data, offset)
            _write(descriptor, more, offset + len(data))
        if self._digests is not None:
            self._digests.passed(name, descriptor, offset, data)
            self._digests.passed(name, descriptor, offset + len(data), more)

    def clone(self, name: str, source: int, offset: int, size: int, at: int) -> None:
        """Share `size` bytes at `offset` of a source file, at `at` of a file; UsageError where that cannot be."""
        reflink.clone(source, offset, size, self._descriptor(name), at, str(self._directory / name))

    @property
    def unread(self) -> bool:
        """Whether runs are shared with sources and nothing has to see their bytes: then they have no CRC32 either, which
        is 0 as torch leaves it with torch.serialization.set_crc32_options(False).
        """
        return self.shares and self._digests is None

    @property
    def hashes(self) -> bool:
        """Whether bytes that are there already have to pass."""
        return self._digests is not None

    def passed(self, name: str, data: memoryview, offset: int) -> None:
        """These bytes, at an offset of a file, are there already."""
        if self._digests is not None:
            self._digests.passed(name, self._descriptor(name), offset, data)

    def take(self, name: str, offset: int) -> bytes | None:
        """The part of the skeleton that begins at `offset`: the caller writes it, behind the payload that ends there.

        None where there is none, and for the last part, which waits for the checksums of all payloads.
        """
        return self._held[name].take(offset)

    def patch(self, name: str, data: bytes, offset: int) -> None:
        """Change bytes of the skeleton: in the last part, which is still held, or in the file."""
        start, part = self._last.get(name, (offset + 1, b""))
        if offset < start:
            self.write(name, data, offset)
            return
        with self._lock:
            start, part = self._last[name]
            if isinstance(part, bytes):
                part = bytearray(part)
                self._last[name] = (start, part)
            part[offset - start : offset - start + len(data)] = data

    def written(self, name: str, low: int, high: int) -> None:
        """Bytes that will not change any more: they may go to the device."""
        if self._sync is not None:
            self._sync.post(self._descriptor(name), low - low % _PAGE, high - high % _PAGE)

    def finish(self, name: str) -> None:
        """The file is complete but for the parts that waited: write them, sync and close."""
        descriptor = self._descriptor(name)
        self._write_held(name)
        self._handed[name] = self._descriptors.pop(name)
        if self._sync is not None:
            self._sync.post(descriptor, 0, -1, name)
        else:
            self._complete(name, descriptor)

    def _complete(self, name: str, descriptor: int) -> None:
        """Close a file that will not change any more, and tell of it when its digests are known."""
        if self._digests is None:
            self._close(name, descriptor, None)
        else:
            self._digests.finish(
                name, descriptor, self._sizes[name], lambda digest: self._close(name, descriptor, digest)
            )

    def _close(self, name: str, descriptor: int, digest: FileDigest | None) -> None:
        found = os.fstat(descriptor)
        os.close(self._handed.pop(name))
        if self._finished is not None:
            self._finished(Finished(name, found.st_size, found.st_mtime_ns, digest))

    def _write_held(self, name: str) -> None:
        for offset, part in self._held.pop(name).left():
            self.write(name, part, offset)
        if name in self._last:
            offset, last = self._last.pop(name)
            self.write(name, last, offset)

    def close(self, *, sync: bool) -> None:
        """With `sync` finish all files: when this returns, each is complete and told of, with `durable` on the device.

        Else give up: what is not finished stays as it is.
        """
        for name in list(self._held) if sync else ():
            self.finish(name)
        if self._sync is not None:
            self._sync.close(discard=not sync)
        if self._digests is not None:
            self._digests.close(discard=not sync)
        for descriptor in (*self._descriptors.values(), *self._handed.values()):
            os.close(descriptor)
        self._descriptors.clear()
        self._handed.clear()
        self._held.clear()
        self._last.clear()


class _Parts:
    """The parts of a skeleton, in order, each to be taken once. Several threads may take different ones."""

    __slots__ = ("_parts", "_taken")

    def __init__(self, parts: Sequence[tuple[int, bytes]]) -> None:
        self._parts, self._taken = parts, bytearray(len(parts))

    def take(self, offset: int) -> bytes | None:
        """The part that begins at an offset."""
        at = bisect_left(self._parts, (offset,))
        if at == len(self._parts) or self._parts[at][0] != offset or self._taken[at]:
            return None
        self._taken[at] = 1
        return self._parts[at][1]

    def take_last(self) -> tuple[int, bytes] | None:
        """The last part and its offset."""
        if not self._parts or self._taken[-1]:
            return None
        self._taken[-1] = 1
        return self._parts[-1]

    def left(self) -> Iterator[tuple[int, bytes]]:
        """The parts that nobody took, and their offsets."""
        return (part for part, taken in zip(self._parts, self._taken, strict=True) if not taken)


class _Sync:
    """A thread that brings written bytes to the device: ranges as they come, whole files with fsync."""

    def __init__(self, synced: Callable[[str, int], None]) -> None:
        self._queue: queue.SimpleQueue[tuple[int, int, int, str] | None] = queue.SimpleQueue()
        self._synced = synced
        self._error: BaseException | None = None
        self._discard = False
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self._thread.start()

    def post(self, descriptor: int, low: int, high: int, name: str = "") -> None:
        """Start writing out bytes [low, high) of a file; with high -1 sync all of it, and say so."""
        if self._error is not None:
            raise self._error
        if high < 0 or high > low:
            self._queue.put((descriptor, low, high, name))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            descriptor, low, high, name = item
            try:
                if self._discard or self._error is not None:
                    continue
                if high < 0:
                    os.fsync(descriptor)
                    self._synced(name, descriptor)
                elif _sync_file_range is not None:
                    _sync_file_range(
                        descriptor, ctypes.c_int64(low), ctypes.c_int64(high - low), ctypes.c_uint(_WRITE_OUT)
                    )  # a hint: fsync is what counts, and reports errors
            except BaseException as error:
                self._error = self._error or error

    def close(self, *, discard: bool = False) -> None:
        """Wait for everything that was posted, or with `discard` only for what is under way; raises what failed."""
        self._discard = self._discard or discard
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and not discard:
            raise self._error


def _allow_open_files() -> None:
    """Raise this process's soft limit of open files to the hard one: a large mesh has thousands of rank files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _allocate(descriptor: int, size: int) -> None:
    """Reserve a file's blocks and set its size; only the size where the file system cannot (a hole reads as zeros).

    Not os.posix_fallocate, which writes every block where the file system cannot reserve. OSError on a full disk.
    """
    if _fallocate is not None:
        if _fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        code = ctypes.get_errno()
        if code in _FULL:
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)


def _write(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    size = len(data)
    if size <= WRITE_BYTES and os.pwrite(descriptor, data, offset) == size:
        return
    view, at = memoryview(data), 0
    while at < size:
        stop = at + WRITE_BYTES - (offset + at) % WRITE_BYTES
        at += os.pwrite(descriptor, view[at:stop], offset + at)
