"""The store of a job whose ranks are all on one node: rank 0 serves it from threads, on a Unix socket.

It has what `Ranks` needs of torch.distributed's TCPStore, whose import alone takes longer than converting a gigabyte.
A message is a line of JSON: a method and its arguments, and as the answer whether it worked and its result.

A rank is a guest of one run: whoever comes as a rank that has been there (the same rank in the job's next run, which is
early) is sent away, and tries again until its own run's rank 0 is there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardtool.execute.meeting import alone, listen

METHODS = ("set", "get", "check", "add", "compare_set", "wait")
RETRY = 0.005  # seconds between looks for rank 0
_NOT_YET = (FileNotFoundError, ConnectionError, BlockingIOError)  # rank 0 is not there, or has many guests at once


class Values:
    """The keys and values, for the threads of one process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        """Set a value."""
        with self._changed:
            if key not in self._values:  # nobody waits for another value
                self._changed.notify_all()
            self._values[key] = value

    def get(self, key: str) -> bytes:
        """A value that is there."""
        with self._changed:
            if key not in self._values:
                raise RuntimeError(f"{key} is not set")
            return os.fsencode(self._values[key])

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these are set."""
        with self._changed:
            return all(key in self._values for key in keys)

    def add(self, key: str, number: int) -> int:
        """Add to a counter, which begins at 0: its new value."""
        with self._changed:
            total = int(self._values.get(key, "0")) + number
            self.set(key, str(total))
            return total

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a value where it is the expected one; one that is not there counts as empty. The value afterwards."""
        with self._changed:
            if self._values.get(key, "") == expected:
                self.set(key, desired)
            return os.fsencode(self._values.get(key, expected))

    def wait(self, key: str, seconds: float) -> bool:
        """Whether a key is set, now or within these seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: key in self._values, seconds)


class Host(Values):
    """Rank 0's: the store itself, served to the others until it is closed. UsageError where it cannot be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._run = os.urandom(8).hex()
        self._guests: dict[int, str] = {}
        self._connections: set[socket.socket] = set()
        self._path = path
        self._closed = False
        self._listener, self._inode = listen(path)
        threading.Thread(target=self._welcome, name="store", daemon=True).start()

    def close(self) -> None:
        """End all connections, and remove the socket."""
        self._closed = True
        with contextlib.suppress(OSError), alone(self._path.parent):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        for connection in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it, which `close` does not
        self._listener.close()

    def _welcome(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()[0]
            except OSError:  # closed; or out of descriptors, which may pass
                time.sleep(RETRY)
                continue
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="store", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as lines:
            rank, guest, run = json.loads(lines.readline())
            known = self._guests.setdefault(rank, guest) == guest and run in ("", self._run) and not self._closed
            connection.sendall(_line([known, self._run]))
            for line in lines if known else ():
                connection.sendall(_line(self._answer(*json.loads(line))))
        self._connections.discard(connection)

    def _answer(self, method: str, *arguments: Any) -> list[Any]:
        try:
            if method not in METHODS:
                raise RuntimeError(f"the store has no {method}")
            result = getattr(self, method)(*arguments)
        except RuntimeError as error:
            return [False, str(error)]
        return [True, os.fsdecode(result) if isinstance(result, bytes) else result]


class Guest:
    """Another rank's: the same methods. OSError where rank 0 does not answer within `timeout` seconds."""

    def __init__(self, path: Path, rank: int, timeout: float) -> None:
        self._path, self._rank, self._timeout = path, rank, timeout
        self._name, self._run = os.urandom(8).hex(), ""
        # A connection belongs to one thread at a time. One whose thread is torn away (SIGTERM, Ctrl-C, a timeout) between
        # question and answer does not come back: the next question would get the last one's answer.
        self._idle: list[_Connection] = []
        until = time.monotonic() + timeout
        while not self._idle:
            try:
                self._idle.append(self._connect())
            except _NOT_YET:
                if time.monotonic() > until:
                    raise
                time.sleep(RETRY)

    def set(self, key: str, value: str) -> None:
        """Set a value."""
        self._ask("set", key, value)

    def get(self, key: str) -> bytes:
        """A value that is there."""
        return os.fsencode(self._ask("get", key))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these are set."""
        return bool(self._ask("check", list(keys)))

    def add(self, key: str, number: int) -> int:
        """Add to a counter, which begins at 0: its new value."""
        return int(self._ask("add", key, number))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a value where it is the expected one; one that is not there counts as empty. The value afterwards."""
        return os.fsencode(self._ask("compare_set", key, expected, desired))

    def wait(self, key: str, seconds: float) -> bool:
        """Whether a key is set, now or within these seconds."""
        return bool(self._ask("wait", key, seconds))

    def close(self) -> None:
        """End the connections."""
        while self._idle:
            self._idle.pop().close()

    def _ask(self, *question: Any) -> Any:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        good, answer = connection.ask(question)
        self._idle.append(connection)
        if not good:
            raise RuntimeError(answer)
        return answer

    def _connect(self) -> _Connection:
        connection = _Connection(self._path, self._timeout)
        good, run = connection.ask([self._rank, self._name, self._run])
        if not good:
            connection.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "rank 0 is that of another run")
        self._run = run
        return connection


class _Connection:
    """One conversation with rank 0."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")

    def ask(self, question: Sequence[Any]) -> Any:
        """Rank 0's answer. After any error, also one from outside, the connection is closed."""
        try:
            self._socket.sendall(_line(question))
            answer = self._lines.readline()
            if not answer.endswith(b"\n"):
                raise ConnectionResetError(errno.ECONNRESET, "rank 0 has ended the connection")
            return json.loads(answer)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def _line(message: Sequence[Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
