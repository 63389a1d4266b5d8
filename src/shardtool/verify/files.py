"""Where a Megatron checkpoint keeps the file of a rank. Paths only: nothing is opened but the tracker file.

The names are those of `get_checkpoint_name` in megatron/training/checkpointing.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shardtool.errors import CheckpointError
from shardtool.layout.mesh import Mesh

Format = Literal["torch", "torch_dist"]

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_directory(path: Path) -> Path:
    """The directory that holds the shards: `path` itself, or the `iter_NNNNNNN` / `release` that its tracker names.

    Raises CheckpointError when there is neither.
    """
    if _format(path) is not None:
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            "this is not a Megatron checkpoint",
            where=str(path),
            expected=f"{TRACKER}, or the mp_rank_* directories or metadata.json of one iteration",
            found="nothing there" if not path.exists() else "none of them",
            hint="give the directory of a Megatron checkpoint",
        )
    text = tracker.read_text().strip()
    if text != "release" and not text.isdecimal():
        raise CheckpointError(
            "the tracker names no iteration",
            where=str(tracker),
            expected="a number or 'release'",
            found=text,
            hint="write the number of the iteration into it, or the word release",
        )
    directory = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not directory.is_dir():
        raise CheckpointError(
            "the tracker names a directory that does not exist", where=str(directory), hint="name the save itself"
        )
    return directory


def checkpoint_format(directory: Path) -> Format:
    """Which format the shards of an iteration directory are in, by the same signs that Megatron-LM goes by.

    Raises CheckpointError when it shows no sign of either.
    """
    found = _format(directory)
    if found is None:
        raise CheckpointError(
            "the directory holds no shards",
            where=str(directory),
            expected="mp_rank_*/model_optim_rng.pt, or metadata.json and .metadata",
            hint="give the directory of a Megatron checkpoint",
        )
    return found


def _format(directory: Path) -> Format | None:
    if (directory / "metadata.json").is_file():
        return "torch_dist"
    return "torch" if next(directory.glob("mp_rank_*"), None) is not None else None


def rank_file(directory: Path, mesh: Mesh, *, tp: int, pp: int, ep: int = 0) -> Path:
    """The file that the rank (tp, pp, ep) of a legacy `torch` checkpoint reads. It may not exist."""
    name = f"mp_rank_{tp:02d}"
    if mesh.pp > 1:
        name += f"_{pp:03d}"
    if mesh.ep > 1:
        name += f"_{ep:03d}"
    return directory / name / "model_optim_rng.pt"
