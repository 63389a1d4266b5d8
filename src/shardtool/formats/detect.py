"""What kind of checkpoint a directory is, from its file names and metadata.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

from shardtool.errors import CheckpointError
from shardtool.formats import hf_bin, safetensors_files
from shardtool.formats.torch_dist import METADATA, check_backend
from shardtool.formats.tracker import TRACKER, find_iteration

Kind = Literal["hf_safetensors", "hf_bin", "megatron_torch", "megatron_torch_dist"]


class Detected(Struct, frozen=True):
    """A checkpoint's kind and the directory that holds its files; `iteration` and `release` are Megatron's."""

    kind: Kind
    directory: Path
    iteration: int | None = None
    release: bool = False


def detect(path: str | Path) -> Detected:
    """The kind of the checkpoint at `path`: a Hugging Face directory, or a Megatron root or one of its saves.

    Raises CheckpointError if it is none, or a Megatron checkpoint of another backend.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise CheckpointError(
            "not a checkpoint",
            where=str(path),
            expected="a directory",
            found=found,
            hint="give the directory of a checkpoint",
        )
    weights = _hugging_face(path)
    if weights is not None and (path / "config.json").is_file():
        return Detected(weights, path)
    if (path / TRACKER).is_file() or _is_save(path):
        save = find_iteration(path)
        return Detected(_megatron(save.directory), save.directory, save.iteration, save.release)
    raise _nothing(path, weights)


def _hugging_face(path: Path) -> Kind | None:
    if (path / safetensors_files.WEIGHTS).exists() or (path / safetensors_files.INDEX).exists():
        return "hf_safetensors"
    if (path / hf_bin.WEIGHTS).exists() or (path / hf_bin.INDEX).exists():
        return "hf_bin"
    return None


def _is_save(path: Path) -> bool:
    return (path / "metadata.json").is_file() or (path / METADATA).is_file() or any(path.glob("mp_rank_*"))


def _megatron(directory: Path) -> Kind:
    # the order of Megatron-LM's _get_checkpoint_format (megatron/training/checkpointing.py)
    if (directory / "metadata.json").is_file():
        check_backend(directory)
        return "megatron_torch_dist"
    if any(directory.glob("mp_rank_*")):
        return "megatron_torch"
    check_backend(directory)
    raise AssertionError("unreachable: check_backend refuses a directory without metadata.json")


def _nothing(path: Path, weights: Kind | None) -> CheckpointError:
    if weights is not None:
        return CheckpointError(
            "weights without a config", where=str(path), expected="config.json beside them",
            hint="copy config.json of the model into the directory",
        )  # fmt: skip
    saves = sorted(entry.name for entry in path.glob("iter_*"))
    names = sorted(entry.name for entry in path.iterdir())
    return CheckpointError(
        "not a checkpoint",
        where=str(path),
        expected=f"config.json with *.safetensors or pytorch_model.bin, or {TRACKER}, mp_rank_*/, metadata.json",
        found=", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "an empty directory",
        hint=f"name the save itself: {path / saves[-1]}" if saves else "give the directory of a checkpoint",
    )
