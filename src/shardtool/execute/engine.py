"""The engine: a plan and two sets of byte places become files, or a comparison.

A plan is lowered to three kinds of work on byte ranges: *runs* (contiguous bytes, gathered with what lies between them
in the target file into large aligned writes), *scatters* (blocks of rows of a source matrix are read once and their
columns go to several targets), and *tiles* (anything else: strided, transposed or converted elements, assembled in a
buffer). Memory is workers x a few buffers, whatever the size of the model. No torch.

The stages are modules: `lower` (tasks, runs), `units` (what a worker takes at once), `worker` (how it is done, with
`stream`, `assemble` and `tiles`), `files` (the target files).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from shardtool.execute.assemble import assemble
from shardtool.execute.compare import Difference, compare
from shardtool.execute.files import Files
from shardtool.execute.lower import Task, moves, tasks
from shardtool.execute.stream import Progress
from shardtool.execute.tiles import Sources
from shardtool.execute.units import Item, Place, Unit, first_places, units
from shardtool.execute.worker import Watch, Worker
from shardtool.formats.stored import Stored
from shardtool.layout.layout import Key

__all__ = [
    "Difference",
    "Files",
    "Place",
    "Progress",
    "Task",
    "Traffic",
    "Watch",
    "assemble",
    "compare",
    "first_places",
    "moves",
    "tasks",
    "write",
]

LOOK = 64  # units ahead among which a worker looks for one of a quiet file


class Traffic(Struct, frozen=True):
    """Bytes of payload that a run has read (more than once where that was cheaper) and written."""

    read: int
    written: int


def write(
    work: Sequence[Item],
    files: Files,
    locate: Callable[[Key], Stored],
    *,
    fills: Mapping[Key, bytes] | None = None,
    jobs: int = 2,
    progress: Progress | None = None,
    place: Callable[[Key], Place] | None = None,
    watch: Watch | None = None,
) -> Traffic:
    """Write every task's tensor to its payload's place, and finish the files.

    `fills` gives the bytes of one padding row of a tensor where padding is not zeros, `place` the file and offset of a
    source tensor, near enough to put the work in the order of the disk (default: `locate`). `watch` is told, before
    its file is finished, of a task that holds NaN or Inf; what it raises ends the run.
    """
    sources = Sources()
    queue = _Queue(units(work, locate, place, fills or {}), files)
    workers = [Worker(number, files, sources, locate, fills or {}, progress, watch) for number in range(max(1, jobs))]
    threads = [threading.Thread(target=queue.serve, args=(worker,), name="worker") for worker in workers[1:]]
    try:
        for thread in threads:
            thread.start()
        queue.serve(workers[0])
        while any(thread.is_alive() for thread in threads):
            try:
                for thread in threads:
                    thread.join()
            except KeyboardInterrupt as error:
                queue.stop(error)
    finally:
        sources.close()
    if queue.error is not None:
        raise queue.error
    return Traffic(sum(worker.space.bytes_read for worker in workers), sum(payload.nbytes for _, _, payload in work))


class _Queue:
    """The units that are left, and who writes to which file: a worker gets the next unit of the quietest file."""

    def __init__(self, work: list[Unit], files: Files) -> None:
        self.error: BaseException | None = None
        self._units = work[::-1]
        self._files = files
        self._lock = threading.Lock()
        self._writers: dict[str, int] = defaultdict(int)
        self._left: dict[str, int] = defaultdict(int)  # units per file
        for unit in work:
            for file in unit.files:
                self._left[file] += 1

    def serve(self, worker: Worker) -> None:
        """Work until nothing is left, or until another worker failed."""
        try:
            while (unit := self._take()) is not None:
                worker.run(unit)
                self._done(unit)
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        """Let no further unit begin; the first error is kept."""
        with self._lock:
            self.error = self.error or error

    def _take(self) -> Unit | None:
        with self._lock:
            if self.error is not None or not self._units:
                return None
            best, least = -1, -1.0
            for at in range(len(self._units) - 1, max(-1, len(self._units) - 1 - LOOK), -1):
                files = self._units[at].files
                busy = sum(self._writers[file] for file in files) / len(files)
                if best < 0 or busy < least:
                    best, least = at, busy
                if not busy:
                    break
            unit = self._units.pop(best)
            for file in unit.files:
                self._writers[file] += 1
            return unit

    def _done(self, unit: Unit) -> None:
        complete = []
        with self._lock:
            for file in unit.files:
                self._writers[file] -= 1
                self._left[file] -= 1
                if not self._left[file]:
                    complete.append(file)
        for file in complete:
            self._files.finish(file)
