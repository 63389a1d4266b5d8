"""SHA-256 of files that are written in pieces, in any order, by several threads: as they are written, at no second read.

SHA-256 goes through a file from its beginning to its end. Bytes that pass when they are next in their file are hashed
by the thread that has just written them; the others are read back from the page cache by threads of this class, as
soon as nothing before them is missing. What is hashed too early (a checksum patched in behind the front) is hashed again.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from shardtool.execute import buffers

BLOCK = 1 << 20  # bytes that are read back at once


class Span(NamedTuple):
    """Bytes [start, end) of a file that have a digest of their own."""

    start: int
    end: int
    name: str


class FileDigest(NamedTuple):
    """A file's SHA-256, and those of its spans by name, in hexadecimal."""

    sha256: str
    spans: dict[str, str]


class _Front:
    """How far a file is hashed. `ranges` are written and not yet hashed; `claimed` may be ahead of `at` for a moment."""

    __slots__ = ("at", "busy", "claimed", "descriptor", "done", "hash", "inner", "ranges", "size", "spans", "stale")

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = sorted(spans)
        self.ranges: dict[int, int] = {}
        self.descriptor = -1
        self.size: int | None = None  # known once the file is complete
        self.done: Callable[[FileDigest], None] | None = None
        self.busy = self.stale = False
        self.restart()

    def restart(self) -> None:
        """Begin at the file's beginning."""
        self.at = self.claimed = 0
        self.hash = hashlib.sha256()
        self.inner = [hashlib.sha256() for _ in self.spans]

    def feed(self, data: memoryview | bytes | bytearray) -> None:
        """Hash the next bytes."""
        self.hash.update(data)
        if self.spans:
            self._feed_spans(memoryview(data))
        self.at += len(data)

    def _feed_spans(self, data: memoryview) -> None:
        low, high = self.at, self.at + len(data)
        for number in range(self._first(low), len(self.spans)):
            span = self.spans[number]
            if span.start >= high:
                break
            self.inner[number].update(data[max(span.start, low) - low : min(span.end, high) - low])

    def _first(self, low: int) -> int:
        """The number of the first span that ends behind `low` (spans do not overlap)."""
        left, right = 0, len(self.spans)
        while left < right:
            middle = (left + right) // 2
            if self.spans[middle].end <= low:
                left = middle + 1
            else:
                right = middle
        return left

    def result(self) -> FileDigest:
        """The digests of the file up to here."""
        spans = {span.name: inner.hexdigest() for span, inner in zip(self.spans, self.inner, strict=True)}
        return FileDigest(self.hash.hexdigest(), spans)


class Digests:
    """The digests of the files of one run. `spans` are the parts of each file that get digests of their own."""

    def __init__(self, spans: Mapping[str, Sequence[Span]] | None = None, *, threads: int = 2) -> None:
        self._spans = spans or {}
        self._lock = threading.Lock()
        self._fronts: dict[str, _Front] = {}
        self._queue: queue.SimpleQueue[_Front | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._discard = False
        self._threads = [threading.Thread(target=self._serve, name="digests", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def passed(self, name: str, descriptor: int, offset: int, data: memoryview | bytes | bytearray) -> None:
        """These bytes have been written to a file, and still lie in `data`. Bytes that are patched later pass again."""
        if self._error is not None:
            raise self._error
        if not len(data):
            return
        end = offset + len(data)
        with self._lock:
            front = self._front(name, descriptor)
            if offset < front.claimed:
                front.stale = True
                return
            if front.busy or offset != front.at:
                front.ranges[offset] = max(end, front.ranges.get(offset, 0))
                return
            front.busy, front.claimed = True, end
        front.feed(data)
        with self._lock:
            front.busy = False
            waiting = front.at in front.ranges
        if waiting:
            self._queue.put(front)

    def finish(self, name: str, descriptor: int, size: int, done: Callable[[FileDigest], None]) -> None:
        """All bytes of a file have passed; `done` is called with its digests, by a thread of this class.

        What has not passed is a hole, or was patched. The descriptor must stay open until then.
        """
        with self._lock:
            front = self._front(name, descriptor)
            front.size, front.done = size, done
        self._queue.put(front)

    def close(self, *, discard: bool = False) -> None:
        """Wait until everything is hashed and `done` is called, or with `discard` not; raises what went wrong."""
        self._discard = self._discard or discard
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._error is not None and not discard:
            raise self._error

    def _front(self, name: str, descriptor: int) -> _Front:
        front = self._fronts.get(name)
        if front is None:
            front = self._fronts[name] = _Front(self._spans.get(name, ()))
        front.descriptor = descriptor
        return front

    def _serve(self) -> None:
        buffer = buffers.buffer(BLOCK)
        while (front := self._queue.get()) is not None:
            try:
                self._advance(front, buffer)
            except BaseException as error:
                self._error = self._error or error

    def _advance(self, front: _Front, buffer: memoryview) -> None:
        """Hash what can be hashed of a file, and tell when that was all of it."""
        while not self._discard and self._error is None:
            with self._lock:
                if front.busy:
                    return  # whoever is at it goes on
                if front.stale and front.size is not None:
                    front.restart()
                    front.stale = False
                end = front.at
                while end in front.ranges:
                    end = front.ranges.pop(end)
                end = end if front.size is None else front.size
                more = front.busy = end > front.at
                front.claimed = end
                done = None if more or front.size is None else front.done
                if done is not None:
                    front.done = None
            if more:
                self._read_back(front, front.at, end, buffer)
                with self._lock:
                    front.busy = False
                continue
            if done is not None:
                done(front.result())
            return

    def _read_back(self, front: _Front, start: int, end: int, buffer: memoryview) -> None:
        for at in range(start, end, BLOCK):
            if self._discard:
                return
            view = buffer[: min(BLOCK, end - at)]
            count = os.preadv(front.descriptor, (view,), at)
            while count < len(view):
                more = os.preadv(front.descriptor, (view[count:],), at + count)
                if not more:
                    raise OSError(5, "a file that was written is shorter than it was")
                count += more
            front.feed(view)


def sha256(data: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: str | os.PathLike[str], block: int = BLOCK) -> str:
    """The SHA-256 of a file, in hexadecimal; OSError where it cannot be read."""
    found: Any = hashlib.sha256()
    buffer = buffers.buffer(block)
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - also for names that are no Path
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return str(found.hexdigest())
