"""Loads one pipeline stage from the shards of a checkpoint, as a rank of a Megatron-LM run would.

This is the independent half of the judge: it knows nothing of shardtool's own layouts. Legacy files are opened by the
name that the rank computes and go through load_state_dict; torch_dist goes through megatron-core's own
dist_checkpointing.load with its default strictness.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from shardtool.errors import CheckpointError
from shardtool.layout.mesh import Chunk, Mesh, chunks, virtual_stages
from shardtool.verify import dist_metadata
from shardtool.verify.files import checkpoint_format, rank_file

EMBEDDING = "embedding.word_embeddings.weight"

# Transformer Engine fuses norms into the linear that follows them; the local spec keeps them apart.
TE_TO_LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}

SHOWN = 8  # key names per problem


def stored_embedding(directory: Path, mesh: Mesh) -> tuple[int, torch.dtype]:
    """Rows of the stored embedding over all tensor parallel ranks (the padded vocabulary), and its dtype.

    Raises CheckpointError when the first stage has no embedding.
    """
    if checkpoint_format(directory) == "torch_dist":
        metadata, _ = dist_metadata.read(directory)
        size, dtype = dist_metadata.shape(metadata, EMBEDDING), dist_metadata.dtype(metadata, EMBEDDING)
        if size is None or dtype is None:
            raise CheckpointError(
                "the checkpoint has no embedding", where=str(directory / ".metadata"), expected=EMBEDDING
            )
        return size[0], dtype
    path = rank_file(directory, mesh, tp=0, pp=0)
    tensor = _model_chunk(_load_file(path), path, mesh, 0).get(EMBEDDING)
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError("the first stage has no embedding", where=str(path), expected=EMBEDDING)
    return tensor.shape[0] * mesh.tp, tensor.dtype


def load_stage(model: GPTModel, directory: Path, mesh: Mesh, chunk: Chunk) -> None:
    """Fill the parameters of a model chunk from the checkpoint in `directory`.

    Raises CheckpointError when a file is missing or unreadable, a key missing or unexpected, or a shape wrong.
    """
    # Whatever a load does not reach shows as NaN in the logits, even if the load itself claims to be complete.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    if checkpoint_format(directory) == "torch_dist":
        _load_torch_dist(model, directory, single=len(chunks(mesh, model.config.num_layers)) == 1)
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        path = rank_file(directory, mesh, tp=rank, pp=chunk.pp)
        _load_legacy(model, _model_chunk(_load_file(path), path, mesh, chunk.vpp), path)


class _Inert:
    """Takes the place of a class in the args of a checkpoint (an enum of another version): built, never used."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


@contextmanager
def _safe(path: Path) -> Iterator[None]:
    """Let torch.load(weights_only=True) read a file whose args hold any classes: each becomes an inert stub."""
    before = torch.serialization.get_safe_globals()
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    stubs: list[Any] = [argparse.Namespace]
    stubs += [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in unknown if name != "argparse.Namespace"]
    try:
        torch.serialization.add_safe_globals(stubs)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _load_file(path: Path) -> Mapping[str, Any]:
    """The content of a .pt file; tensors stay on disk until they are used. No code of the file is run."""
    if not path.is_file():
        raise CheckpointError("a rank's file does not exist", where=str(path))
    try:
        with _safe(path):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged zip or pickle raises almost anything
        raise CheckpointError(
            "a rank's file cannot be read", where=str(path), found=str(error).splitlines()[0]
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError("a rank's file is not a dict", where=str(path), found=type(content).__name__)
    return content


def _model_chunk(content: Mapping[str, Any], path: Path, mesh: Mesh, vpp: int) -> Mapping[str, Any]:
    """The state dict of virtual stage `vpp`."""
    key = f"model{vpp}" if virtual_stages(mesh) > 1 else "model"
    state = content.get(key)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            "a rank's file has no weights of this model chunk",
            where=str(path),
            expected=key,
            found=", ".join(map(str, content)),
        )
    return state


def local_name(key: str) -> str:
    """The name that the local layer spec has for a key of either spec."""
    for theirs, ours in TE_TO_LOCAL.items():
        if key.endswith("." + theirs):
            return key.removesuffix(theirs) + ours
    return key


def _load_legacy(model: GPTModel, stored: Mapping[str, Any], path: Path) -> None:
    state: dict[str, Any] = {}
    for key, value in stored.items():
        if key.endswith("._extra_state"):
            continue  # FP8 calibration of Transformer Engine, no weight
        if (name := local_name(key)) in state:
            raise CheckpointError("a tensor is there under two names", where=f"{path}: {key}", found=name)
        state[name] = value
    # As strict=True, but for _extra_state, which the local spec asks for without having any.
    try:
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError) as error:  # another shape, or not a tensor
        lines = [line.strip() for line in str(error).splitlines()[1:] if "_extra_state" not in line]
        raise CheckpointError(
            "a rank's weights do not fit the model", where=str(path), details=_few(lines or [str(error)])
        ) from error
    missing = [key for key in result.missing_keys if not key.endswith("._extra_state")]
    details = []
    for what, keys in (("missing", missing), ("unexpected", result.unexpected_keys)):
        details += [f"{what}: {line}" for line in _few(_folded(keys))]
    if details:
        raise CheckpointError(
            "a rank's file and the model have different tensors", where=str(path), details=tuple(details)
        )


def _folded(keys: list[str]) -> list[str]:
    """Key names with the layer number as *, each once."""
    return list(dict.fromkeys(re.sub(r"(?<=layers\.)\d+", "*", key) for key in keys))


def _few(lines: list[str]) -> tuple[str, ...]:
    rest = len(lines) - SHOWN
    return (*lines[:SHOWN], f"and {rest} more") if rest > 0 else tuple(lines)


def _load_torch_dist(model: GPTModel, directory: Path, *, single: bool) -> None:
    metadata, readable = dist_metadata.read(directory)
    with _loadable(directory, metadata, readable) as place, _safe(place / "common.pt"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            content = dist_checkpointing.load_content_metadata(str(place))
            if place != directory:
                content = {**dist_metadata.content_metadata(metadata), **(content or {})}
            sharded = model.sharded_state_dict(metadata=content)
            # The access check wants every layer to be asked for by some rank; one stage of several asks for its own.
            state = dist_checkpointing.load(sharded, str(place), validate_access_integrity=single)
        except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
            raise _load_error(error, directory) from error
    state = {key: value for key, value in state.items() if isinstance(key, str) and key in sharded}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _load_error(error, directory) from error


def _load_error(error: BaseException, directory: Path) -> CheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)] or lines[:SHOWN]
    details = list(dict.fromkeys(reason)) or [type(error).__name__]
    return CheckpointError("megatron-core cannot load the checkpoint", where=str(directory), details=_few(details))


@contextmanager
def _loadable(directory: Path, metadata: Any, readable: bool) -> Iterator[Path]:
    """A directory that the installed megatron-core can load: the checkpoint's own, as a rule.

    megatron-core >= 0.19 writes no common.pt, without which 0.18 and older refuse to load; and the .metadata of 0.11 to
    0.15 names classes that newer versions may not have. Then a temporary directory stands in: links to the shards, an
    empty common.pt, the same index in plain torch classes. The checkpoint itself is never written to.
    """
    if readable and (directory / "common.pt").is_file():
        yield directory
        return
    place = Path(tempfile.mkdtemp(prefix="shardtool-verify-"))
    try:
        for entry in directory.iterdir():
            (place / entry.name).symlink_to(entry.resolve())
        if not (place / "common.pt").exists():
            torch.save({}, place / "common.pt")
        if not readable:
            import pickle  # noqa: PLC0415 (this branch only)

            vars(metadata).pop("all_local_plans", None)  # the plans of the ranks that saved; nothing reads them
            (place / ".metadata").unlink()
            (place / ".metadata").write_bytes(pickle.dumps(metadata))
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
