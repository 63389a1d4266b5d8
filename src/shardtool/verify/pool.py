"""Worker processes that run megatron-core, one per tensor parallel rank, kept for the next job.

A worker is a fresh interpreter (`python -m shardtool.verify.worker`), because the shims change megatron-core and
torch.cuda for the whole process, and starting one takes seconds: `get_pool` keeps the pool of each size. Parent and
workers speak over a socket pair; the workers find each other through a FileStore and speak gloo.

A worker that dies, raises or stays silent ends the job with an error that carries its words, never with a hang.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

from msgspec import Struct

from shardtool.errors import CheckpointError, ShardtoolError, UsageError
from shardtool.families.architecture import Architecture
from shardtool.layout.mesh import Mesh

DEFAULT_TIMEOUT = 3600.0  # seconds for one job
GRACE = 20.0  # seconds that the other ranks get once one has failed

Dtype = Literal["float32", "bfloat16", "float16"]


class Job(Struct, frozen=True):
    """Build the model, load it stage by stage from `directory` (an iteration directory), run the prompts.

    Rank 0 writes `output`, a torch file {"logits": [positions of all prompts, vocabulary],
    "hidden": [num_layers + 1, traced positions of all prompts, hidden], "experts": [expert layers, experts]}: fp32, fp32,
    bool. The vocabulary is the true one.
    """

    directory: Path
    architecture: Architecture
    mesh: Mesh
    prompts: tuple[tuple[int, ...], ...]
    traced: tuple[tuple[int, ...], ...]
    dtype: Dtype
    output: Path


class Reply(Struct, frozen=True):
    """What a worker says of a job: nothing wrong (`error` None), or what. `broken`: this worker cannot go on."""

    error: ShardtoolError | None = None
    broken: bool = False


class Pool:
    """`tp` workers. Use `get_pool`, which keeps them; a pool that is no longer `alive` is not used again."""

    def __init__(self, tp: int) -> None:
        self.tp = tp
        self.alive = True
        self.directory = Path(tempfile.mkdtemp(prefix="shardtool-pool-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        threads = max((os.cpu_count() or 1) // tp, 1)
        for rank in range(tp):
            self._start(rank, threads)

    def _start(self, rank: int, threads: int) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "CUDA_VISIBLE_DEVICES": "",  # the shims put everything on the CPU
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if Path("/sys/class/net/lo").exists():
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not resolve for a group on one host
        command = [sys.executable, "-m", "shardtool.verify.worker"]
        command += [str(theirs.fileno()), str(rank), str(self.tp), str(self.directory / "store")]
        with (self.directory / f"rank{rank}.log").open("wb") as log, theirs:
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)
        self._connections.append(Connection(ours.detach()))

    def run(self, job: Job, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Run a job on all workers; its output file is there when this returns.

        Raises CheckpointError with the workers' words when the checkpoint cannot be loaded whole or a worker fails,
        UsageError when megatron-core cannot express the model.
        """
        if not self.alive:
            raise CheckpointError("the verification workers have ended", hint="give the same command again")
        failures: list[ShardtoolError] = []
        deadline = time.monotonic() + timeout
        try:
            for connection in self._connections:
                connection.send(job)
        except OSError:
            pass  # a dead worker: its end of file follows
        pending = list(self._connections)
        broken = False
        while pending:
            ready = wait(pending, max(deadline - time.monotonic(), 0.0))
            if not ready:
                silent = [self._connections.index(connection) for connection in pending]
                failures.append(self._failure("did not answer in time", silent))
                broken = True
                break
            for connection in [one for one in pending if one in ready]:
                pending.remove(connection)
                reply = self._receive(connection)
                broken |= reply.broken
                if reply.error is not None:
                    failures.append(reply.error)
                if reply.broken:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if broken:
            self.close()
        if failures:
            raise _merged(failures)

    def _receive(self, connection: Connection) -> Reply:
        try:
            reply = connection.recv()
        except (EOFError, OSError):
            return Reply(self._failure("died", [self._connections.index(connection)]), broken=True)
        assert isinstance(reply, Reply)
        return reply

    def _failure(self, what: str, ranks: Sequence[int]) -> ShardtoolError:
        process = self._processes[ranks[0]]
        code = process.poll()
        if code is None and what == "died":
            try:
                code = process.wait(5)
            except subprocess.TimeoutExpired:
                code = None
        log = (self.directory / f"rank{ranks[0]}.log").read_text(errors="replace").strip().splitlines()
        killed = code is not None and code < 0
        hint = (
            "out of memory? one pipeline stage in the chosen dtype must fit" if killed else "its last lines are above"
        )
        return CheckpointError(
            f"a verification worker {what}",
            where=f"tensor parallel rank {', '.join(map(str, ranks))} of {self.tp}",
            found=None if code is None else (signal.Signals(-code).name if killed else f"exit code {code}"),
            hint=hint,
            details=tuple(log[-12:]),
        )

    def close(self) -> None:
        """End the workers and remove the pool's directory. Harmless when called twice."""
        self.alive = False
        for connection in self._connections:
            connection.close()  # a worker that is waiting for a job ends at this
        deadline = time.monotonic() + 2.0
        for process in self._processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def _merged(failures: list[ShardtoolError]) -> ShardtoolError:
    """One error for all ranks: a wrong request first, else the first failure with what the others add to it."""
    for failure in failures:
        if isinstance(failure, UsageError):
            return failure
    first = failures[0]
    others = [str(failure).splitlines()[0] for failure in failures[1:] if str(failure) != str(first)]
    return type(first)(
        first.what,
        where=first.where,
        expected=first.expected,
        found=first.found,
        hint=first.hint,
        details=(*first.details, *dict.fromkeys(others)),
    )


_pools: dict[int, Pool] = {}


def get_pool(tp: int) -> Pool:
    """The pool of `tp` workers; started at the first call, or when the last one has ended. Returns at once."""
    pool = _pools.get(tp)
    if pool is None or not pool.alive:
        pool = _pools[tp] = Pool(tp)
    return pool


def close_pools() -> None:
    """End all workers. Called at exit; they also end by themselves when this process does."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


atexit.register(close_pools)
