"""Several processes, one conversion: the ranks of torchrun or srun (RANK and WORLD_SIZE in the environment).

Every rank makes the same plan from the headers and writes its share of the files into one staging directory; rank 0
writes what is left and commits. They meet in a directory beside the target, on the file system that they share anyway:
no port, no server, and no torch, whose import takes longer than converting a GB. Each file there has one writer and
appears whole (it is renamed into place):

- `here-K`: rank K is alive: its nonce, the digest of its plan, the bytes that it has written, a counter that moves;
- `go`: rank 0 has seen all ranks: the staging directory, and all nonces, so that nobody takes for new what a killed run
  has left;
- `done-K`, `failed-K`: what rank K has written, or its error;
- `end`: all shares are there; `bye-K`: rank K will not look again.

A rank that fails, or that is silent for too long, ends the run of all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardtool.errors import ShardtoolError, UsageError

TIMEOUT_VARIABLE = "SHARDTOOL_RANK_TIMEOUT"
TIMEOUT = 300.0  # seconds without a sign of life
POLL = 0.005  # seconds between looks while waiting
BEAT = 0.5  # seconds between signs of life
FAREWELL = 5.0  # seconds that rank 0 waits for the others to have seen the end
# what tells one job from another that has the same target
_JOB = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")


class RankError(ShardtoolError):
    """Another rank failed, or is gone. Exit code 1."""

    kind = "rank"


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, number of ranks) of this process: (0, 1) without a launcher. UsageError where they make no sense."""
    try:
        rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise UsageError(
            "RANK and WORLD_SIZE in the environment make no sense",
            expected="0 <= RANK < WORLD_SIZE, as torchrun sets them",
            found=f"RANK={environment.get('RANK')} WORLD_SIZE={environment.get('WORLD_SIZE')}",
            hint="unset both to run one process",
        )
    return rank, size


def shares(files: Sequence[tuple[str, int]], size: int) -> dict[str, int]:
    """The rank of each (file, bytes): neighbours stay together, and the ranks have about the same number of bytes."""
    total, before = sum(count for _, count in files), 0
    found = {}
    for name, count in files:
        found[name] = min(size - 1, (2 * before + count) * size // (2 * total)) if total else 0
        before += count
    return found


class Ranks:
    """The ranks of a run, seen from one of them. A context manager: an error inside is told to the others.

    Raises RankError from its methods when another rank failed.
    """

    def __init__(self, dst: Path, digest: str, environment: Mapping[str, str] = os.environ) -> None:
        self.rank, self.size = place(environment)
        self.written = 0  # bytes of payload, for the others to see
        self.on_progress: Callable[[int], None] | None = None  # told the bytes that other ranks have written since
        self._digest, self._nonce = digest, uuid.uuid4().hex
        self._nonces: list[str] = []
        job = "\0".join([*(environment.get(name, "") for name in _JOB), dst.name, str(self.size)])
        mark = hashlib.sha256(job.encode()).hexdigest()[:8]
        self._directory = dst.absolute().parent / f".{dst.name}.ranks-{mark}"
        self._timeout = float(environment.get(TIMEOUT_VARIABLE, TIMEOUT))
        self._count = 0
        self._seen: dict[int, tuple[int, int, float]] = {}  # of each rank: counter, bytes, when it moved
        self._error: RankError | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handler: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that commits, and the only one that prints a result."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.size > 1:
            if threading.current_thread() is threading.main_thread():
                self._handler = signal.signal(signal.SIGTERM, _terminated)  # launchers end ranks like that
            self._directory.mkdir(parents=True, exist_ok=True)
            if self.first:  # ranks that are waiting already write theirs again
                for entry in self._directory.iterdir():
                    entry.unlink(missing_ok=True)
        return self

    def begin(self, stage: str = "") -> str:
        """Wait until all ranks are there. Returns the staging directory, which rank 0 gives."""
        if self.size == 1:
            return stage
        go = self._call(stage) if self.first else self._answer()
        self._nonces = go["nonces"]
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()
        return str(go["stage"])

    def _call(self, stage: str) -> dict[str, Any]:
        """Rank 0: wait for the others, and tell them to go."""
        here: dict[int, dict[str, Any]] = {}
        error: RankError | None = None
        started = time.monotonic()
        while len(here) < self.size - 1 and error is None:
            for rank in range(1, self.size):
                found = self._read(f"here-{rank}")
                if found is not None:
                    here[rank] = found
                    if found["digest"] != self._digest:
                        error = RankError(
                            f"rank {rank} has made another plan than rank 0",
                            hint="all ranks need the same arguments, the same shardtool and the same source",
                        )
            if time.monotonic() - started > self._timeout:
                missing = [str(rank) for rank in range(1, self.size) if rank not in here]
                error = RankError(
                    f"ranks did not come: {', '.join(missing)}",
                    where=str(self._directory),
                    expected=f"{self.size} ranks (WORLD_SIZE) within {self._timeout:.0f} s",
                    found=str(1 + len(here)),
                    hint="start all ranks on one shared file system; unset RANK and WORLD_SIZE to run one process",
                )
            time.sleep(POLL)
        self._nonces = [self._nonce, *(here.get(rank, {}).get("nonce", "") for rank in range(1, self.size))]
        go = {"nonces": self._nonces, "stage": stage}
        self._write("go", go | ({"error": error.what} if error else {}))
        if error is not None:
            raise error
        return go

    def _answer(self) -> dict[str, Any]:
        """Other ranks: be there until rank 0 says go."""
        started = time.monotonic()
        while True:
            go = self._read("go")
            if go is not None and go["nonces"][self.rank : self.rank + 1] == [self._nonce]:
                self._nonces = go["nonces"]
                if "error" in go:
                    raise RankError(f"rank 0 failed: {go['error']}")
                return go
            if not (self._directory / f"here-{self.rank}").exists():
                self._beat()
            if time.monotonic() - started > self._timeout:
                raise RankError("rank 0 did not come", where=str(self._directory), hint="start all ranks")
            time.sleep(POLL)

    def check(self) -> None:
        """Raises RankError when another rank has failed or is silent."""
        if self._error is not None:
            raise self._error

    def gather(self, result: Mapping[str, int]) -> dict[str, int]:
        """Rank 0: wait until all shares are written. Returns the sums of what the ranks report."""
        total = dict(result)
        if self.size == 1:
            return total
        for rank in range(1, self.size):
            found = self._wait(f"done-{rank}", rank)
            for name, value in found["result"].items():
                total[name] += value
        self._error = self._error or self._look()  # the last of their progress
        self.check()
        return total

    def report(self, result: Mapping[str, int]) -> None:
        """Other ranks: this share is written. Returns when rank 0 has all of them."""
        self._beat()
        self._write(f"done-{self.rank}", {"nonce": self._nonce, "result": dict(result)})
        self._wait("end", 0)

    def end(self) -> None:
        """Rank 0: everything is written."""
        if self.size > 1:
            self._write("end", {"nonce": self._nonce})

    def _wait(self, name: str, rank: int) -> dict[str, Any]:
        while True:
            found = self._read(name)
            if found is not None and found["nonce"] == self._nonces[rank]:
                return found
            self.check()
            time.sleep(POLL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self.size == 1:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if error is not None:
                what = error.what if isinstance(error, ShardtoolError) else f"{type(error).__name__}: {error}"
                what = what if isinstance(error, RankError) else f"rank {self.rank} failed: {what}"  # or hearsay
                self._write(f"failed-{self.rank}", {"nonce": self._nonce, "what": what})
            self._part()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _part(self) -> None:
        """Leave: rank 0 last, it removes the directory. A rank that failed lets rank 0 see it first."""
        until = time.monotonic() + FAREWELL
        if self.first:
            while time.monotonic() < until and self._nonces:
                if all((self._directory / f"bye-{rank}").exists() for rank in range(1, self.size)):
                    break
                time.sleep(POLL)
            shutil.rmtree(self._directory, ignore_errors=True)
        elif not self._nonces:  # rank 0 never came
            for name in (f"here-{self.rank}", f"failed-{self.rank}"):
                (self._directory / name).unlink(missing_ok=True)
            self._directory.rmdir()  # OSError where another rank still waits
        else:
            self._write(f"bye-{self.rank}", {})
            while time.monotonic() < until and (self._directory / f"failed-{self.rank}").exists():
                time.sleep(POLL)

    def _watch(self) -> None:
        """Every now and then: a sign of life, and a look at the others'."""
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                self._beat()
            if self._error is None:
                self._error = self._look()

    def _look(self) -> RankError | None:
        with self._lock:
            return self._look_round()

    def _look_round(self) -> RankError | None:
        now, new = time.monotonic(), 0
        for rank in range(self.size):
            if rank == self.rank:
                continue
            failed = self._read(f"failed-{rank}")
            if failed is not None and failed["nonce"] == self._nonces[rank]:
                return RankError(str(failed["what"]))
            here = self._read(f"here-{rank}") or {}
            counter, written, since = self._seen.get(rank, (-1, 0, now))
            if here.get("nonce") == self._nonces[rank] and here["counter"] != counter:
                new += here["written"] - written
                counter, written, since = here["counter"], here["written"], now
            self._seen[rank] = (counter, written, since)
            if now - since > self._timeout and self._read(f"done-{rank}") is None:
                return RankError(
                    f"rank {rank} is silent",
                    where=str(self._directory),
                    expected=f"a sign of life within {self._timeout:.0f} s",
                    hint="its process was killed, or its node is gone",
                )
        if new and self.on_progress is not None:
            self.on_progress(new)
        return None

    def _beat(self) -> None:
        with self._lock:
            self._count += 1
            here = {"nonce": self._nonce, "digest": self._digest, "written": self.written, "counter": self._count}
            self._write(f"here-{self.rank}", here)

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        new = self._directory / f".{name}-{self._nonce}"
        new.write_text(json.dumps(data))
        new.rename(self._directory / name)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self._directory / name).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


def _terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)
