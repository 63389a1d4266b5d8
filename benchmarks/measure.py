"""One command measured: wall and CPU seconds, and in runs of their own the peak of its anonymous memory.

A virtual machine may give free memory back to its host, and the first touch of such a page is then ten times slower
than the next. So `touch` goes through the memory that is free, before each command; sources are read
once, so that they are in the page cache; what an earlier command has written is on the device before the clock starts.

The kernel begins to write to the device when a tenth of the memory is dirty, and every call that then needs the device
(making a directory, removing a file on a file system mounted with `discard`) waits behind the gigabytes in its queue.
Who meets that is chance, so `held_back` puts it off for all commands alike.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PAGE = 4096
MOST = 8 << 30  # bytes that are touched: more than a command needs
RESERVE = 300 << 20  # bytes that stay free, so that nothing is thrown out of the page cache
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
LIMITS = {"dirty_ratio": "80", "dirty_background_ratio": "70"}  # percent of the memory that can be dirty
SAMPLE = 0.002  # seconds between looks at a process's memory
# the interpreter keeps its compiled modules, as it does for everybody who has run a program before
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def touch() -> None:
    """Write to the memory that is free, and give it back."""
    free = int(Path("/proc/meminfo").read_text().split("MemFree:")[1].split()[0]) * 1024
    with mmap.mmap(-1, max(PAGE, min(MOST, free - RESERVE)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(POPULATE_WRITE)


@contextlib.contextmanager
def held_back() -> Iterator[bool]:
    """While it lasts the kernel writes nothing to the device of its own accord; False where that is not ours to say."""
    kernel = Path("/proc/sys/vm")
    before = {name: (kernel / name).read_text().strip() for name in LIMITS}
    try:
        try:
            for name, percent in LIMITS.items():
                (kernel / name).write_text(percent)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        with contextlib.suppress(OSError):
            for name, percent in reversed(before.items()):
                (kernel / name).write_text(percent)


def cool(folder: Path) -> None:
    """Drop a directory's files from the page cache, which then has room without throwing other pages out."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Read a directory's files, so that they are in the page cache."""
    buffer = bytearray(1 << 20)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def timed(
    command: Sequence[str], out: Path, *, source: Path | None = None, told: list[str] | None = None
) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of a command that writes `out`, which is removed before and after.

    `source` is read before, so that it is in the page cache; `told` gets what it says on stdout.
    """
    remove(out)
    os.sync()
    if source is not None:
        warm(source)
    touch()  # last: free pages are given back to the host after seconds
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    if told is not None:
        told.append(done.stdout)
    remove(out)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def anonymous_peak(command: Sequence[str], out: Path | None = None) -> int:
    """The most anonymous memory (RssAnon: heap, buffers, stacks, no mapped files) that a process has, in bytes."""
    if out is not None:
        remove(out)
    peak = 0
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as run:
        while run.poll() is None:
            with contextlib.suppress(OSError, ValueError, IndexError):
                status = Path(f"/proc/{run.pid}/status").read_text()
                peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(SAMPLE)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)}: exit {run.returncode}\n{run.stderr.read() if run.stderr else ''}")
    if out is not None:
        remove(out)
    return peak


def remove(path: Path) -> None:
    """Remove a directory that may not be there."""
    shutil.rmtree(path, ignore_errors=True)
