"""shardtool.json: what made an output, of what, and the SHA-256 of each of its files.

It is a function of the source, the options and the versions alone: no times, no host, no number of threads.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec import Struct

from shardtool import __version__
from shardtool.checkpoint.target import Target
from shardtool.errors import GET_AGAIN, CheckpointError, UsageError
from shardtool.execute.digests import Span, hash_file
from shardtool.execute.journal import Record
from shardtool.formats.hf_index import strict_json
from shardtool.formats.small_files import read_small

MANIFEST = "shardtool.json"
FORMAT = 1
LIBRARIES = ("numpy", "ml_dtypes", "isal")  # whose code bytes pass through
LARGEST = 1 << 30  # bytes of a manifest that are read


class ManifestFile(Struct, frozen=True):
    """A file of an output. `tensors` are (name, part, dtype, shape, SHA-256) entries, where they were asked for."""

    size: int
    sha256: str
    tensors: tuple[Mapping[str, Any], ...] = ()


def versions() -> dict[str, str]:
    """shardtool's version, and those of the libraries that touch bytes.

    By the names of their directories: importlib.metadata takes as long as a plan to import.
    """
    found: dict[str, str] = {}
    for directory in sys.path:
        with suppress(OSError):
            for entry in os.listdir(directory or "."):  # noqa: PTH208 - a Path for each entry costs more than the look
                name, dash, version = entry.partition("-")
                if dash and name in LIBRARIES and version.endswith(".dist-info"):
                    found.setdefault(name, version.removesuffix(".dist-info"))
    return {"shardtool": __version__} | {name: found.get(name, "not installed") for name in LIBRARIES}


def command_line(direction: str, src: str, options: Mapping[str, Any]) -> list[str]:
    """The command, with every option that shapes the output and no other."""
    words = ["shardtool", direction, src, "DST"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def tensor_spans(target: Target) -> dict[str, list[Span]]:
    """The bytes of every tensor in its file, for digests of their own."""
    found: dict[str, list[Span]] = {name: [] for name in target.skeletons}
    for key in target.places:
        name, payload = target.payload(key)
        found[name].append(Span(payload.offset, payload.offset + payload.nbytes, json.dumps(key)))
    return found


def listed(record: Record, target: Target) -> ManifestFile:
    """A finished file of a target as an entry of the manifest."""
    tensors = []
    for label, digest in record.tensors.items():
        file, tensor, part = json.loads(label)
        payload = target.payload((file, tensor, tuple(part)))[1]
        entry = {"name": tensor, "part": part, "dtype": payload.dtype, "shape": list(payload.shape), "sha256": digest}
        tensors.append(entry)
    return ManifestFile(record.size, record.sha256, tuple(tensors))


def manifest_bytes(
    command: Sequence[str],
    plan_digest: str,
    source: Mapping[str, Any],
    files: Mapping[str, ManifestFile],
    verdict: Mapping[str, Any] | None = None,
) -> bytes:
    """The manifest of an output whose files (names below its root) are these; `verdict` is that of a translation."""
    entries: dict[str, dict[str, Any]] = {}
    for name, file in sorted(files.items()):
        entries[name] = {"size": file.size} | ({"sha256": file.sha256} if file.sha256 else {})
        if file.tensors:
            entries[name]["tensors"] = list(file.tensors)
    head = {
        "shardtool_manifest": FORMAT,
        "versions": versions(),
        "command": shlex.join(command),
        "plan_digest": plan_digest,
        **({} if verdict is None else {"verdict": verdict}),
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    lines.append(f'"source": {{"path": {json.dumps(str(source["path"]))}, "files": {{')
    lines += [*_table(source["files"]), "}},", '"files": {', *_table(entries), "}"]
    return ("{\n" + "\n".join(lines) + "\n}\n").encode()


def _table(entries: Mapping[str, Any]) -> list[str]:
    """The entries of a JSON object, each on a line of its own."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items()]
    return [",\n".join(lines)] if lines else []


class Findings(Struct, frozen=True):
    """A directory against its manifest."""

    path: Path
    files: int  # that were compared
    nbytes: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the directory holds exactly the files of the manifest."""
        return not (self.missing or self.extra or self.changed)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        names = ("files", "nbytes", "missing", "extra", "changed")
        return {"path": str(self.path), "same": self.same} | {
            name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names
        }

    def lines(self) -> list[str]:
        """For people."""
        verdict = "as written" if self.same else "NOT as written"
        return [
            *(f"{kind}: {name}" for kind in ("missing", "extra", "changed") for name in getattr(self, kind)),
            f"{self.path}: {self.files} files, {self.nbytes:,} bytes, {verdict}",
        ]


def check(directory: Path, *, threads: int = 2) -> Findings:
    """Compare a directory with its manifest: every file there, none beside them, each of its size and SHA-256.

    UsageError without a manifest, or with one that has no checksums; CheckpointError for a damaged one.
    """
    expected = read_files(directory)
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - slow to import, and conversions do not need it

    present = set(_files(directory)) - {MANIFEST}
    missing, extra = sorted(expected.keys() - present), sorted(present - expected.keys())
    both = sorted(expected.keys() & present)
    with ThreadPoolExecutor(threads) as pool:
        same = pool.map(lambda name: _same(directory / name, expected[name]), both)
        changed = [name for name, equal in zip(both, same, strict=True) if not equal]
    nbytes = sum(expected[name].size for name in both)
    return Findings(directory, len(both), nbytes, tuple(missing), tuple(extra), tuple(changed))


def read_files(directory: Path) -> dict[str, ManifestFile]:
    """The files that a directory's manifest lists, with their sizes and checksums."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"no {MANIFEST}",
            where=str(directory),
            hint="only what shardtool has written has a manifest to check against",
        )
    data: dict[str, Any] = strict_json(read_small(path, LARGEST), str(path))
    try:
        if data["shardtool_manifest"] != FORMAT:
            raise ValueError(f"format {data['shardtool_manifest']!r}")
        found = {
            _inside(name): ManifestFile(int(file["size"]), file.get("sha256", ""))
            for name, file in data["files"].items()
        }
        bare = [name for name, file in found.items() if not file.sha256]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError("the manifest is damaged", where=str(path), found=_told(error), hint=GET_AGAIN) from None
    if bare:
        raise UsageError(
            "the manifest has no checksums", where=str(path), found="written with --no-checksums",
            hint="convert again without --no-checksums",
        )  # fmt: skip
    return found


def _told(error: Exception) -> str:
    return f"no entry {error}" if isinstance(error, KeyError) else str(error)[:200]


def _inside(name: Any) -> str:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or not place.parts:
        raise ValueError(f"a name outside the directory: {name!r}")
    return str(place)


def _files(directory: Path) -> Iterable[str]:
    for root, folders, names in os.walk(directory):
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in (*names, *links):
            yield Path(root, name).relative_to(directory).as_posix()


def _same(path: Path, expected: ManifestFile) -> bool:
    if path.is_symlink() and not path.is_file():
        return False
    return path.stat().st_size == expected.size and hash_file(path) == expected.sha256
