"""The journal of a run: what is finished, so that the same command can go on after a crash.

A journal is a text file of JSON lines beside the output, one of each process that writes. The first line has the key of
the run, each further line one file that is complete and synced, or a fact. A line that a crash cut short ends what is
believed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict

VERSION = 1
PATTERN = "journal-*.jsonl"


class Record(Struct, frozen=True):
    """A finished file: bytes, time of modification, SHA-256 ("" without checksums), and that of each tensor asked for."""

    size: int
    mtime_ns: int
    sha256: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)


class Entries(Struct):
    """What journals hold. `key` is "" where there is none."""

    key: str = ""
    files: dict[str, Record] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def read_all(directory: Path) -> Entries:
    """The entries of all journals of a run (those that have the first one's key)."""
    found = Entries()
    for path in sorted(directory.glob(PATTERN)):
        one = read_entries(path)
        if one.key and one.key == (found.key or one.key):
            found = Entries(one.key, found.files | one.files, found.facts | one.facts)
    return found


def read_entries(path: Path) -> Entries:
    """The whole lines of a journal, as far as they make sense; empty where there is none."""
    found = Entries()
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return found
    for number, line in enumerate(lines):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            if number == 0:
                if entry["journal"] != VERSION:
                    return Entries()
                found.key = str(entry["key"])
            elif "file" in entry:
                name = str(entry.pop("file"))
                found.files[name] = Record(**entry)
            else:
                found.facts.update(entry)
        except (ValueError, TypeError, KeyError):
            return found
    return found


class Journal:
    """The journal of one process. Lines are added by any thread; each goes to the file at once."""

    def __init__(self, directory: Path, key: str, rank: int = 0, known: Entries | None = None) -> None:
        """Begin a journal with these entries; one of this rank that is there is replaced."""
        self.files = dict(known.files) if known else {}
        self.facts = dict(known.facts) if known else {}
        self._lock = threading.Lock()
        path = directory / PATTERN.replace("*", str(rank))
        new = path.with_suffix(".new")
        self._descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._add({"journal": VERSION, "key": key})
        if self.facts:
            self._add(self.facts)
        for name, record in self.files.items():
            self._add({"file": name, **asdict(record)})
        new.rename(path)

    def finished(self, name: str, record: Record) -> None:
        """A file is complete and will not change."""
        with self._lock:
            self._add({"file": name, **asdict(record)})
            self.files[name] = record

    def learned(self, name: str, value: Any) -> None:
        """A fact that need not be found out again."""
        with self._lock:
            self._add({name: value})
            self.facts[name] = value

    def _add(self, entry: Mapping[str, Any]) -> None:
        data = json.dumps(entry).encode() + b"\n"
        count = os.write(self._descriptor, data)
        while count < len(data):
            count += os.write(self._descriptor, data[count:])

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
