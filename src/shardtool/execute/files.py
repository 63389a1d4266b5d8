"""The target files of a run: sized and headed first, written at known places, synced while others are still written."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import resource
import threading
from collections.abc import Mapping
from pathlib import Path

from shardtool.formats.stored import Skeleton

OPEN_FILES = 512  # descriptors that are kept; the others are opened again when they are needed
_PAGE = 4096
_WRITE_OUT = 2  # SYNC_FILE_RANGE_WRITE: start writing dirty pages, wait for nothing
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate", None)  # Linux only, as the next
_sync_file_range = getattr(_libc, "sync_file_range", None)


class Files:
    """Target files with their skeletons. The first part of a skeleton is written at once, the others with the payload
    that they follow, or at the end. With `durable` a file is synced as soon as it is complete, by a thread of its own.
    """

    def __init__(self, directory: Path, skeletons: Mapping[str, Skeleton], *, durable: bool = True) -> None:
        self._directory = directory
        self._durable = durable
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._held: dict[str, dict[int, bytes]] = {}
        self._last: dict[str, tuple[int, bytes | bytearray]] = {}
        self._sync = _Sync() if durable else None
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
            if skeleton.size:
                _allocate(descriptor, skeleton.size)
            held = dict(skeleton.parts)
            if 0 in held:
                _write(descriptor, held.pop(0), 0)
        except BaseException:
            os.close(descriptor)
            raise
        if held:
            last = max(held)
            self._last[name] = (last, held.pop(last))
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
        _write(self._descriptor(name), data, offset)

    def write_both(self, name: str, data: memoryview, more: bytearray, offset: int) -> None:
        """Write bytes at an offset of a file, and more behind them."""
        done = os.pwritev(self._descriptor(name), (data, more), offset)
        if done < len(data) + len(more):
            self.write(name, data[done:], offset + done)
            self.write(name, more[max(0, done - len(data)) :], offset + max(done, len(data)))

    def take(self, name: str, offset: int) -> bytes | None:
        """The part of the skeleton that begins at `offset`: the caller writes it, behind the payload that ends there.

        None where there is none, and for the last part, which waits for the checksums of all payloads.
        """
        return self._held[name].pop(offset, None)

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
        del self._descriptors[name]
        if self._sync is not None:
            self._sync.post(descriptor, 0, -1)
        else:
            os.close(descriptor)

    def _write_held(self, name: str) -> None:
        parts: dict[int, bytes | bytearray] = dict(self._held.pop(name, {}))
        parts.update([self._last.pop(name)] if name in self._last else [])
        for offset, part in parts.items():
            self.write(name, part, offset)

    def close(self, *, sync: bool) -> None:
        """Close all files, with `sync` after their last parts are written and everything is on the device."""
        try:
            if sync:
                for name in list(self._held):
                    if self._durable:
                        self.finish(name)
                    else:
                        self._write_held(name)
            if self._sync is not None:
                self._sync.close(discard=not sync)
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._held.clear()
            self._last.clear()


class _Sync:
    """A thread that brings written bytes to the device: ranges as they come, whole files with fsync and close."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._discard = False
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self._thread.start()

    def post(self, descriptor: int, low: int, high: int) -> None:
        """Start writing out bytes [low, high) of a file; with high -1 sync all of it and close it."""
        if self._error is not None:
            raise self._error
        if high < 0 or high > low:
            self._queue.put((descriptor, low, high))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            descriptor, low, high = item
            try:
                if high < 0:
                    if not self._discard and self._error is None:
                        os.fsync(descriptor)
                    os.close(descriptor)
                elif not self._discard and _sync_file_range is not None:
                    _sync_file_range(
                        descriptor, ctypes.c_int64(low), ctypes.c_int64(high - low), ctypes.c_uint(_WRITE_OUT)
                    )  # a hint: fsync is what counts, and reports errors
            except OSError as error:
                self._error = self._error or error

    def close(self, *, discard: bool) -> None:
        """Wait for everything that was posted; raises OSError where a sync failed."""
        self._discard = discard
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
    count = os.pwrite(descriptor, data, offset)
    if count != len(data):
        view = memoryview(data)[count:]
        while view:
            offset += count
            count = os.pwrite(descriptor, view, offset)
            view = view[count:]
