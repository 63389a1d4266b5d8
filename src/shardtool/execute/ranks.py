"""Several processes, one conversion: the ranks of torchrun or srun, who write their shares of the files.

Every rank makes the same plan from the headers and writes its share into one staging directory, on a file system that
all of them share; rank 0 makes that directory, writes what is left and commits. They speak through the job's store. On
one node rank 0 serves it (`local_store`). Across nodes it is torch.distributed's TCPStore at MASTER_ADDR:MASTER_PORT,
which torchrun's agent hosts, or else rank 0: clusters let that through their firewalls, and it knows their networks.
Only then torch is imported, which takes each process seconds.

Keys of the store: `here-K` (the digest of rank K's plan), `go` (the staging directory), `beat-K` (a counter that moves
while rank K is alive), `written-K` (bytes of payload), `done-K` (what it has done), `failed` (the first error), `end`
(committed), `left` (how many have seen the end or the error), `gone` (all have). Waits are short and begin again, so
that an error or a rank that has fallen silent ends them. Rank 0 watches the others, and they watch rank 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn, Protocol

from shardtool.errors import ShardtoolError, UsageError, reason, unknown_value
from shardtool.execute.launcher import neighbours, place

TIMEOUT_VARIABLE = "SHARDTOOL_RANK_TIMEOUT"
STORE_VARIABLE = "SHARDTOOL_STORE"
STORES = ("local", "torch")
TIMEOUT = 300.0  # seconds without a sign of life
LOOK = 0.05  # seconds between looks for an error while waiting
POLL = 0.01  # seconds between looks into torch's store while waiting
BEAT = 0.25  # seconds between signs of life
FAREWELL = 5.0  # seconds that a rank waits for the others to have seen the end, or its error


class Store(Protocol):
    """What the ranks need of a store; all but `wait` and `close` as TCPStore has it."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: Sequence[str]) -> bool: ...
    def add(self, key: str, number: int) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def wait(self, key: str, seconds: float) -> bool:
        """Whether a key is set, now or within these seconds."""

    def close(self) -> None: ...


class RankError(ShardtoolError):
    """Another rank failed, or is gone. Exit code 1."""

    kind = "rank"


def shares(files: Sequence[tuple[str, int]], size: int) -> dict[str, int]:
    """The rank of each (file, bytes): neighbours stay together, and the ranks have about the same number of bytes."""
    total, before = sum(number for _, number in files), 0
    found = {}
    for name, number in files:
        found[name] = min(size - 1, (2 * before + number) * size // (2 * total)) if total else 0
        before += number
    return found


class Ranks:
    """The ranks of a run, seen from one of them. A context manager: an error inside is told to the others.

    Raises RankError from its methods when another rank has failed. Of one rank alone it does nothing.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, store: Store | None = None) -> None:
        self.rank, self.size = place(environment)
        self.written = 0  # bytes of payload, for the others to see
        self.on_progress: Callable[[int], None] | None = None  # told the bytes that other ranks have written since
        self._timeout = float(environment.get(TIMEOUT_VARIABLE, TIMEOUT))
        self._environment = environment
        self._store = store
        self._seen: dict[int, tuple[int, int, float]] = {}  # of each rank: counter, bytes, when it moved
        self._error: RankError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handler: Any = None
        self._ended = False

    @property
    def first(self) -> bool:
        """Whether this is the rank that commits, and the only one that prints a result."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.size > 1:
            if threading.current_thread() is threading.main_thread():
                self._handler = signal.signal(signal.SIGTERM, _terminated)  # launchers end ranks like that
            try:
                if self._store is None:
                    self._store = _job_store(self.rank, self.size, self._timeout, self._environment)
            except BaseException:
                self._restore_handler()
                raise
            self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
            self._thread.start()
        return self

    def begin(self, digest: str, stage: str = "") -> str:
        """Wait until all ranks have the same plan. Returns the staging directory, which rank 0 gives."""
        if self.size == 1:
            return stage
        self._set(f"here-{self.rank}", digest)
        if not self.first:
            return self._wait("go")
        for rank in range(1, self.size):
            if self._wait(f"here-{rank}") != digest:
                raise RankError(
                    f"rank {rank} has made another plan than rank 0",
                    hint="all ranks need the same arguments, the same shardtool and the same source",
                )
        self._set("go", stage)
        return stage

    def check(self) -> None:
        """Raises RankError when another rank has failed or is silent."""
        if self._error is not None:
            raise self._error

    def gather(self, result: Mapping[str, int]) -> dict[str, int]:
        """Rank 0: wait until all shares are written. Returns the sums of what the ranks report."""
        total = dict(result)
        for rank in range(1, self.size):
            for name, value in json.loads(self._wait(f"done-{rank}")).items():
                total[name] += value
        return total

    def report(self, result: Mapping[str, int]) -> None:
        """Other ranks: this share is written. Returns when rank 0 has committed."""
        self._set(f"done-{self.rank}", json.dumps(dict(result)))
        self._wait("end")
        self._ended = True

    def end(self) -> None:
        """Rank 0: everything is committed."""
        if self.size > 1:
            self._set("end", "1")
            self._ended = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self.size == 1:
            return
        if error is not None and not self._ended:
            what = error.what if isinstance(error, ShardtoolError) else f"{type(error).__name__}: {error}"
            what = what if isinstance(error, RankError) else f"rank {self.rank} failed: {what}"  # or hearsay
            with contextlib.suppress(RankError):
                self._call("compare_set", "failed", "", what)
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._part(failed=error is not None)
        if self._store is not None:
            self._store.close()
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _part(self, *, failed: bool) -> None:
        """Leave. Whose end would be that of the others (rank 0 may host the store; a launcher ends all ranks when one
        has failed) waits until they have seen what there is to see.
        """
        with contextlib.suppress(RankError):
            if self._store is None or self._thread is None:
                return
            if self._call("add", "left", 1) == self.size:
                self._set("gone", "1")
            elif self.first or failed:
                self._call("wait", "gone", FAREWELL)

    # --- the store -----------------------------------------------------------------------------------------------

    def _wait(self, key: str) -> str:
        """The value of a key that another rank will set."""
        while True:
            self.check()
            if self._call("wait", key, LOOK):
                return os.fsdecode(self._call("get", key))

    def _set(self, key: str, value: str) -> None:
        self._call("set", key, value)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, method)(*arguments)
        except (RuntimeError, OSError) as error:  # torch.distributed's errors are RuntimeErrors
            raise RankError(
                "the job's store does not answer",
                found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
                hint="rank 0 or torchrun's agent is gone: see what it said",
            ) from None

    def _watch(self) -> None:
        """Every now and then: a sign of life, and a look at the others'."""
        started = time.monotonic()
        while not self._stop.is_set():
            try:
                self._call("set", f"written-{self.rank}", str(self.written))
                self._call("add", f"beat-{self.rank}", 1)
                self._look(started)
            except RankError as error:
                self._error = error
                return
            self._stop.wait(BEAT)

    def _look(self, started: float) -> None:
        if self._call("check", ["failed"]):
            raise RankError(os.fsdecode(self._call("get", "failed")), hint="the output of that rank says more")
        now, new = time.monotonic(), 0
        for rank in range(1, self.size) if self.first else (0,):
            if self._call("check", [f"done-{rank}"]):
                continue
            beat = self._call("add", f"beat-{rank}", 0)
            counter, written, since = self._seen.get(rank, (0, 0, started))
            if beat != counter:
                now_written = int(self._call("get", f"written-{rank}"))
                new += now_written - written
                counter, written, since = beat, now_written, now
            self._seen[rank] = (counter, written, since)
            if now - since > self._timeout:
                self._silent(rank, arrived=counter > 0)
        if new and self.on_progress is not None:
            self.on_progress(new)

    def _silent(self, rank: int, *, arrived: bool) -> NoReturn:
        expected = f"a sign of life within {self._timeout:.0f} s"
        if arrived:
            raise RankError(
                f"rank {rank} is silent",
                expected=expected,
                hint="its process was killed, or its node is gone: start all again",
            )
        raise RankError(f"rank {rank} did not come", expected=expected, hint="start all ranks of WORLD_SIZE")


def _job_store(rank: int, size: int, timeout: float, environment: Mapping[str, str]) -> Store:
    """The store of the job: on one node a local one, otherwise torch's. SHARDTOOL_STORE can say which."""
    wanted = environment.get(STORE_VARIABLE, "local" if neighbours(environment) == size else "torch")
    if wanted not in STORES:
        raise unknown_value(STORE_VARIABLE, wanted, STORES)
    if wanted == "torch":
        return _torch_store(rank, size, timeout, environment)
    # sockets, which a run of one process does without
    from shardtool.execute.local_store import Guest, Host  # noqa: PLC0415
    from shardtool.execute.meeting import SHARED, socket_path  # noqa: PLC0415

    path = socket_path(environment)
    if rank == 0:
        return Host(path)
    try:
        return Guest(path, rank, timeout)
    except OSError as error:
        raise RankError(
            "rank 0 is not there",
            where=str(path),
            expected=f"its socket, within {timeout:.0f} s",
            found=reason(error),
            hint=f"see what rank 0 said; where it is in another container, {SHARED}",
        ) from None


def _torch_store(rank: int, size: int, timeout: float, environment: Mapping[str, str]) -> Store:
    """torch.distributed's, as its env:// finds it: torchrun's agent hosts it, or rank 0 does."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UsageError(
            f"{size} ranks, and {' and '.join(missing)} not in the environment",
            expected="the address and a free port of the first rank's node, as torchrun sets them",
            hint="start with torchrun, or export both before srun",
        )
    # only ranks on several nodes need torch
    from torch.distributed.distributed_c10d import PrefixStore  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    wait = timedelta(seconds=timeout)
    try:
        store = next(iter(rendezvous("env://", rank, size, timeout=wait)))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            "the job's store cannot be reached",
            where=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
            found=str(error).splitlines()[0][:200],
            hint="rank 0 has to run at MASTER_ADDR, and MASTER_PORT has to be free there",
        ) from None
    store.set_timeout(wait)
    # torchrun's agent keeps it for all commands of its job: each rank counts its runs there, so that all agree
    return Polled(PrefixStore(f"shardtool-{store.add(f'shardtool-runs-{rank}', 1)}", store))


class Polled:
    """A store of torch.distributed, whose own `wait` is deaf to everything else: this one looks again and again."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.set, self.get, self.check = store.set, store.get, store.check
        self.add, self.compare_set = store.add, store.compare_set

    def wait(self, key: str, seconds: float) -> bool:
        """Whether a key is set, now or within these seconds."""
        until = time.monotonic() + seconds
        while not (found := self._store.check([key])) and time.monotonic() < until:
            time.sleep(POLL)
        return bool(found)

    def close(self) -> None:
        """It ends with the process, or its agent."""


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)
