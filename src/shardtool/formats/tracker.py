"""Which directory of a Megatron checkpoint holds the newest save.

Source: read_metadata and get_checkpoint_name in megatron/training/checkpointing.py, megatron-core 0.16.1.
"""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from shardtool.errors import CheckpointError
from shardtool.formats.small_files import read_small

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")
_RANK = re.compile(r"mp_rank_\d{2,}(_\d{3,}){0,2}")


class Iteration(Struct, frozen=True):
    """One save of a Megatron checkpoint: its directory, and the root if it was found through the tracker file.

    `iteration` is None where neither tracker nor directory name tells it (`release` is iteration None).
    """

    directory: Path
    iteration: int | None
    release: bool
    root: Path | None


def find_iteration(path: str | Path) -> Iteration:
    """The save that `path` means: a root with a tracker file, or an iter_0000100 or release directory itself.

    Raises CheckpointError if there is none, or if the tracker names a directory that is not there.
    """
    path = Path(path)
    if (path / TRACKER).is_file():
        return _tracked(path)
    named = _ITERATION.fullmatch(path.name)
    if path.is_dir() and (named or path.name == "release" or _has_ranks(path) or (path / "metadata.json").is_file()):
        return Iteration(path, int(named[1]) if named else None, path.name == "release", None)
    saves = sorted(entry.name for entry in path.glob("iter_*")) if path.is_dir() else []
    raise CheckpointError(
        "not a Megatron checkpoint",
        where=str(path),
        expected=f"{TRACKER}, or an iter_0000100 or release directory",
        found="no such directory" if not path.exists() else ", ".join(saves[:5]) or "neither",
        hint=f"name one of them: {path / saves[-1]}" if saves else "give the directory of a Megatron checkpoint",
    )


def tracker_bytes(iteration: int | None) -> bytes:
    """The content of the tracker file: the iteration, or `release` for None."""
    return b"release" if iteration is None else b"%d" % iteration


def iteration_name(iteration: int | None) -> str:
    """The directory of a save: `iter_0000100`, or `release` for None."""
    return "release" if iteration is None else f"iter_{iteration:07d}"


def _tracked(root: Path) -> Iteration:
    tracker = root / TRACKER
    text = read_small(tracker, 1024).decode("latin-1").strip()
    if text != "release" and not re.fullmatch(r"\d{1,18}", text):
        raise CheckpointError(
            "the tracker file is damaged",
            where=str(tracker),
            expected="an iteration, or release",
            found=repr(text[:40]),
            hint="write the number of the iteration into it, or the word release",
        )
    iteration = None if text == "release" else int(text)
    directory = root / iteration_name(iteration)
    if not directory.is_dir():
        others = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise CheckpointError(
            "the save that the tracker file names is missing", where=str(tracker), expected=directory.name,
            found=", ".join(others[:5]) or "no directory",
            hint=f"name the save itself: {root / others[-1]}" if others else "copy the directory of the save as well",
        )  # fmt: skip
    return Iteration(directory, iteration, iteration is None, root)


def _has_ranks(path: Path) -> bool:
    return any(_RANK.fullmatch(entry.name) for entry in path.iterdir())
