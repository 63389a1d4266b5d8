"""The one place that prints: results on stdout, conversation on stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

QUIET_INTERVAL = 30.0  # seconds between progress lines where stderr is no terminal


class Settings(Struct):
    """What the common options say; set once by the command that runs."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    answered: bool = False  # a result has been printed

    def reset(self) -> None:
        """As before any option was read."""
        for name, value in asdict(Settings()).items():
            setattr(self, name, value)


SETTINGS = Settings()


def result(data: dict[str, Any], lines: Iterable[str]) -> None:
    """The result of a command: `data` with --json, else `lines`."""
    SETTINGS.answered = True
    if SETTINGS.json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        for line in lines:
            sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """One line of conversation."""
    if not SETTINGS.quiet:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """Progress in bytes on stderr: a bar with rate and time left on a terminal, else a line every 30 s."""
    if SETTINGS.quiet:
        yield lambda _count, _file: None
    elif sys.stderr.isatty():
        yield from _bar(total, what)
    else:
        yield from _lines(total, what)


def _bar(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console  # noqa: PLC0415 - rich is needed only for a bar on a terminal
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )  # fmt: skip

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[file]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, file="")
        yield lambda count, file: bar.update(task, advance=count, file=file)


def _lines(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    lock = threading.Lock()
    started = last = time.monotonic()
    done = 0

    def advance(count: int, file: str) -> None:
        nonlocal done, last
        with lock:
            done += count
            now = time.monotonic()
            if now - last >= QUIET_INTERVAL:
                last = now
                rate = done / (now - started)
                left = (total - done) / rate if rate else 0
                say(f"{what}: {size(done)} of {size(total)}, {size(rate)}/s, {left:.0f} s left, {file}")

    yield advance
