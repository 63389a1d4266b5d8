"""Megatron's `torch` format: one mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt per rank.

Source of facts: megatron/training/checkpointing.py (get_checkpoint_name, generate_state_dict) of megatron-core 0.16.1;
the files are what 0.14 to 0.19 write and load.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from shardtool.errors import GET_AGAIN, CheckpointError, a_kind
from shardtool.formats import torch_zip, torch_zip_out
from shardtool.formats.hf_index import inside
from shardtool.formats.inert import DType, Inert, TensorRef, plain
from shardtool.formats.pickle_out import TensorOut
from shardtool.formats.stored import ITEMSIZE, Skeleton, Stored
from shardtool.formats.tracker import Iteration, find_iteration

__all__ = [
    "Iteration",
    "Rank",
    "RankFile",
    "find_iteration",
    "namespace",
    "rank_files",
    "rank_name",
    "rank_skeleton",
    "read_rank",
    "read_ranks",
    "resolve_rank_fields",
]  # fmt: skip

FILE_NAME = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_CHUNK = re.compile(r"model(\d*)")


class Rank(Struct, frozen=True, order=True):
    """Which rank a file belongs to: (dense) tensor, pipeline and expert parallel."""

    tp: int
    pp: int
    ep: int


class RankFile(Struct, frozen=True):
    """One rank's file: launch arguments as plain data, and per virtual pipeline chunk the tensors by name.

    `ignored` are entries of the model that are no weights (`_extra_state` and None), with the chunk's key in front;
    `other_keys` the top-level keys that hold no model (optimizer, rng_state, ...).
    """

    path: str
    args: dict[str, Any] | None
    chunks: list[dict[str, Stored]]
    iteration: int | None
    checkpoint_version: float | str | None  # a word is wrong, and errors show it
    ignored: list[str]
    other_keys: list[str]


def rank_files(directory: str | Path) -> list[tuple[Path, tuple[int, ...]]]:
    """Every rank's file in a save, with the numbers of its folder's name: (tp,), (tp, pp or ep) or (tp, pp, ep).

    Raises CheckpointError if there is none, if a folder lacks its file, or if the names do not have the same form.
    """
    found: list[tuple[Path, tuple[int, ...]]] = []
    for folder in sorted(Path(directory).iterdir()):
        match = _FOLDER.fullmatch(folder.name)
        if match:
            if not (folder / FILE_NAME).is_file():
                raise CheckpointError(
                    "a rank has no file",
                    where=str(folder),
                    expected=FILE_NAME,
                    hint="copy the mp_rank folders of all ranks",
                )
            inside(Path(directory), folder / FILE_NAME)
            found.append((folder / FILE_NAME, tuple(int(part) for part in match.groups() if part is not None)))
    if not found or len({len(fields) for _, fields in found}) > 1:
        names = ", ".join(path.parent.name for path, _ in found[:4])
        raise CheckpointError(
            "the directory holds no set of Megatron ranks", where=str(directory),
            expected=f"mp_rank_00/{FILE_NAME} and its like", found=names or "none",
            hint="copy all mp_rank folders of one save, with their own names",
        )  # fmt: skip
    twice = [fields for fields, count in Counter(fields for _, fields in found).items() if count > 1]
    if twice:  # mp_rank_00 and mp_rank_000
        names = ", ".join(path.parent.name for path, fields in found if fields == twice[0])
        raise CheckpointError(
            "two folders belong to the same rank", where=str(directory), expected="one", found=names,
            hint="remove the folder that is not of this save",
        )  # fmt: skip
    return found


def rank_name(tp: int, pp: int, ep: int, pp_size: int, ep_size: int) -> str:
    """The folder of a rank: the pipeline number only with pp_size > 1, the expert number only with ep_size > 1."""
    name = f"mp_rank_{tp:02d}"
    if pp_size > 1:
        name += f"_{pp:03d}"
    if ep_size > 1:
        name += f"_{ep:03d}"
    return name


def read_rank(path: str | Path) -> RankFile:
    """What one rank's file holds. No payload is read and nothing that the file pickles is run.

    Raises CheckpointError for a file without a model, a nested state dict from before megatron-core, and a weight of a
    kind that is no plain tensor (an FP8 tensor subclass).
    """
    file = torch_zip.read(path)
    root = file.root
    if not isinstance(root, dict):
        raise CheckpointError("the file is no Megatron checkpoint", where=str(path), found=a_kind(root), hint=GET_AGAIN)
    keys = _chunk_keys(root, str(path))
    chunks: list[dict[str, Stored]] = []
    ignored: list[str] = []
    for key in keys:
        tensors, skipped = _chunk(file, key, root[key])
        chunks.append(tensors)
        ignored += skipped
    args = plain(root["args"], str(path)) if isinstance(root.get("args"), Inert | dict) else None
    iteration = root.get("iteration", root.get("total_iters"))
    version = root.get("checkpoint_version")
    return RankFile(
        path=str(path),
        args=args if isinstance(args, dict) else None,
        chunks=chunks,
        iteration=iteration if isinstance(iteration, int) else None,
        checkpoint_version=float(version) if isinstance(version, int | float) else _word(version),
        ignored=ignored,
        other_keys=[str(key) for key in root if key not in keys],
    )


def _word(value: object) -> str | None:
    return None if value is None else str(value) if isinstance(value, str) else a_kind(value)


def _chunk_keys(root: dict[object, object], path: str) -> list[str]:
    keys = [key for key in root if isinstance(key, str) and _CHUNK.fullmatch(key)]
    keys.sort(key=lambda key: int(key[5:] or 0))
    expected = ["model"] if len(keys) == 1 and keys[0] == "model" else [f"model{i}" for i in range(len(keys))]
    if not keys or keys != expected:
        raise CheckpointError(
            "the file holds no whole Megatron model", where=path, expected="a key model, or model0, model1, ...",
            found=", ".join(str(key) for key in list(root)[:8]) or "nothing",
            hint="save the whole model: with virtual stages every one of model0, model1, ...",
        )  # fmt: skip
    return keys


def _chunk(file: torch_zip.TorchFile, key: str, model: object) -> tuple[dict[str, Stored], list[str]]:
    where = f"{file.path}: {key}"
    if isinstance(model, dict) and ("language_model" in model or "encoder" in model):
        raise CheckpointError(
            "the file holds a model from before megatron-core (--use-legacy-models)", where=where,
            expected="a flat state dict with decoder.layers.*", found="a nested one with language_model",
            hint="convert it to megatron-core with Megatron-LM core_v0.12 (tools/checkpoint, loader_legacy)",
        )  # fmt: skip
    if not isinstance(model, dict):
        raise CheckpointError(
            "the file holds no state dict",
            where=where,
            found=a_kind(model),
            hint="save model.state_dict() with torch.save",
        )
    tensors: dict[str, Stored] = {}
    ignored: list[str] = []
    for name, value in model.items():
        if str(name).endswith("_extra_state") or value is None:
            ignored.append(f"{key}: {name}")
        elif isinstance(value, TensorRef):
            tensors[str(name)] = torch_zip.stored_tensor(file, value, f"{key}: {name}")
        else:
            kind = str(value.kind) if isinstance(value, Inert) else a_kind(value)
            raise CheckpointError(
                "an entry of the model is no plain tensor", where=f"{where}: {name}", found=kind,
                hint="save the model with high-precision weights (without --fp8-param-gather)",
            )  # fmt: skip
    return tensors, ignored


def read_ranks(directory: str | Path) -> dict[Rank, RankFile]:
    """Every rank's file of a save, by rank.

    Raises CheckpointError for a damaged file, for two files of one rank, and for a gap: a pipeline or tensor rank
    without a file.
    """
    files = {fields: read_rank(path) for path, fields in rank_files(directory)}
    ranks = resolve_rank_fields(files)
    made = {ranks[fields]: file for fields, file in files.items()}
    _check_grid(made, str(directory))
    return made


def resolve_rank_fields(files: Mapping[tuple[int, ...], RankFile]) -> dict[tuple[int, ...], Rank]:
    """The rank that the numbers of each folder's name mean.

    With two numbers the second one is the pipeline or the expert rank: decided from args
    (pipeline_model_parallel_size, expert_model_parallel_size), else from the keys, because only a pipeline split has
    files without the embedding. Raises CheckpointError if the args fit neither.
    """
    pairs = [fields for fields in files if len(fields) == 2]
    expert = bool(pairs) and _second_is_expert({fields: files[fields] for fields in pairs})
    ranks: dict[tuple[int, ...], Rank] = {}
    for fields in files:
        if len(fields) == 2:
            ranks[fields] = Rank(fields[0], 0, fields[1]) if expert else Rank(fields[0], fields[1], 0)
        else:
            ranks[fields] = Rank(*(*fields, 0, 0)[:3])
    return ranks


def _second_is_expert(files: Mapping[tuple[int, ...], RankFile]) -> bool:
    file = next(iter(files.values()))
    args = file.args or {}
    pp, ep = args.get("pipeline_model_parallel_size"), args.get("expert_model_parallel_size")
    if isinstance(pp, int) and (pp > 1 or isinstance(ep, int)):
        if pp > 1 and isinstance(ep, int) and ep > 1:
            raise CheckpointError(
                "the folder's name lacks a number", where=file.path, expected=f"mp_rank_00_000_000 (pp {pp}, ep {ep})",
                found=Path(file.path).parent.name,
                hint="give the folders the names that Megatron-LM gave them",
            )  # fmt: skip
        return pp == 1
    return all(any("embedding.word_embeddings" in name for name in other.chunks[0]) for other in files.values())


def _check_grid(files: Mapping[Rank, RankFile], where: str) -> None:
    """Every (tp, pp) and every ep has a file; which (tp, ep) pairs exist depends on the expert-tensor parallel size."""
    args = next(iter(files.values())).args or {}

    def size(name: str, seen: int) -> int:
        value = args.get(name)
        return max(value if isinstance(value, int) else 1, seen)

    tp = size("tensor_model_parallel_size", 1 + max(rank.tp for rank in files))
    pp = size("pipeline_model_parallel_size", 1 + max(rank.pp for rank in files))
    ep = size("expert_model_parallel_size", 1 + max(rank.ep for rank in files))
    dense = {(rank.tp, rank.pp) for rank in files}
    missing = [f"tp {t} pp {p}" for p in range(pp) for t in range(tp) if (t, p) not in dense]
    experts = {(rank.pp, rank.ep) for rank in files}
    missing += [f"pp {p} ep {e}" for p in range(pp) for e in range(ep) if (p, e) not in experts]
    if missing:
        raise CheckpointError(
            "ranks of the checkpoint are missing", where=where, expected=f"tp {tp} x pp {pp} x ep {ep}",
            found=f"no file for {', '.join(missing[:6])}", hint="copy the mp_rank folders of all ranks",
        )  # fmt: skip


def namespace(args: Mapping[str, Any]) -> Namespace:
    """Launch arguments as a Namespace that every megatron-core from 0.14 on loads: primitives and dtypes only.

    Strings like 'torch.bfloat16' become dtypes.
    """
    made = Namespace()
    for name, value in args.items():
        is_dtype = isinstance(value, str) and value.startswith("torch.") and value[6:] in ITEMSIZE
        setattr(made, name, DType(value[6:]) if is_dtype else value)
    return made


def rank_skeleton(
    args: Mapping[str, Any],
    chunks: Sequence[Sequence[tuple[str, tuple[int, ...], str]]],
    iteration: int,
    extra_state_keys: Sequence[Sequence[str]] = (),
    residues: Mapping[tuple[int, str], int] | None = None,
) -> Skeleton:
    """One rank's model_optim_rng.pt before its payload, keyed (chunk, tensor name).

    `chunks` are the (key, shape, dtype) of each virtual pipeline chunk; one chunk is saved as `model`, several as
    `model0`, `model1`, ... `extra_state_keys`, per chunk, become None, the value that local linears save
    (megatron-core layers.py, get_extra_state); Transformer Engine takes it as "no FP8 state". `residues` are places of
    payloads (TensorOut).
    """
    root: dict[str, object] = {"args": namespace(args), "checkpoint_version": 3.0, "iteration": iteration}
    for index, chunk in enumerate(chunks):
        model: OrderedDict[str, object] = OrderedDict()
        for name, shape, dtype in chunk:
            model[name] = TensorOut((index, name), dtype, tuple(shape), (residues or {}).get((index, name), -1))
        for name in extra_state_keys[index] if index < len(extra_state_keys) else ():
            model[name] = None
        root["model" if len(chunks) == 1 else f"model{index}"] = model
    root["num_floating_point_operations_so_far"] = 0
    return torch_zip_out.skeleton(root, name="model_optim_rng")
