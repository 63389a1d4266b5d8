"""Loads one pipeline stage from the shards of a checkpoint, as a rank of a Megatron-LM run would.

This is the independent half of the judge: it knows nothing of shardtool's own layouts. Legacy files are opened by the
name that the rank computes and go through load_state_dict; torch_dist goes through megatron-core's own
dist_checkpointing.load with its default strictness.

A worker's world is one tensor parallel group, smaller than that of a run with expert parallelism. So a rank holds all
experts, and gathers them from the files of all expert parallel ranks: which rank has which file and which shard comes
from megatron-core's own RankGenerator. Dense tensors come from one of the files of the rank's tensor parallel rank.

Multi-token-prediction layers (`mtp.`, and the second embedding beside them) are not loaded: no logit of the main model
depends on them. The accounting and the exact level cover them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import lcm
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from msgspec import Struct, field
from torch.distributed.checkpoint.api import CheckpointException

from shardtool.errors import GET_AGAIN, CheckpointError, no_embedding
from shardtool.layout.mesh import Chunk, Mesh, virtual_stages
from shardtool.verify import dist_metadata
from shardtool.verify.files import checkpoint_format, rank_file

EMBEDDING = "embedding.word_embeddings.weight"

# Transformer Engine fuses norms into the linear that follows them; the local spec keeps them apart.
TE_TO_LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}

# torch_dist keys of norms: how the local spec asks for them, and what Transformer Engine's spec has instead
DIST_NORMS = (
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    (".self_attention.linear_qkv.layer_norm_", ".self_attention.in_proj.layer_norm_"),
    (".self_attention.q_layernorm.", ".self_attention.linear_q_up_proj.layer_norm_"),
    (".self_attention.kv_layernorm.", ".self_attention.linear_kv_up_proj.layer_norm_"),
)

# whole on every rank under Transformer Engine (0.14 and newer), split over the ranks in the local spec
DOWN_PROJECTIONS = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight")

EXPERT = re.compile(
    r"(?P<at>.*\.experts\.)(local_experts\.(?P<alone>\d+)\.)?"
    r"((?P<leaf>linear_fc[12]\.(weight|bias))(?P<grouped>\d*)|(?P<transposed>weight[12]))"
)

SHOWN = 8  # key names per problem


def stored_embedding(directory: Path, mesh: Mesh) -> tuple[int, torch.dtype]:
    """Rows of the stored embedding over all tensor parallel ranks (the padded vocabulary), and its dtype.

    Raises CheckpointError when the first stage has no embedding.
    """
    if checkpoint_format(directory) == "torch_dist":
        metadata, _ = dist_metadata.read(directory)
        size, dtype = dist_metadata.shape(metadata, EMBEDDING), dist_metadata.dtype(metadata, EMBEDDING)
        if size is None or dtype is None:
            raise no_embedding(str(directory / ".metadata"))
        return size[0], dtype
    path = rank_file(directory, mesh, tp=0, pp=0)
    tensor = _model_chunk(_load_file(path), path, mesh, 0).get(EMBEDDING)
    if not isinstance(tensor, torch.Tensor):
        raise no_embedding(str(path))
    return tensor.shape[0] * mesh.tp, tensor.dtype


def load_stage(model: GPTModel, directory: Path, mesh: Mesh, chunk: Chunk) -> None:
    """Fill the parameters of a model chunk from the checkpoint in `directory`.

    Raises CheckpointError when a file is missing or unreadable, a key missing or unexpected, or a shape wrong.
    """
    # Whatever a load does not reach shows as NaN in the logits, even if the load itself claims to be complete.
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.fill_(float("nan"))
    if checkpoint_format(directory) == "torch_dist":
        _load_torch_dist(model, directory, single=mesh.pp == 1)
    else:
        ranks = _Ranks(directory, mesh, chunk, parallel_state.get_tensor_model_parallel_rank())
        path = ranks.own_file()
        state = dict(_local_names(_dense(ranks.state(path), chunk), path))
        _cut_down_projections(state, model, ranks.tp)
        if model.config.num_moe_experts is not None:
            state.update(_experts(model, ranks))
        _load_legacy(model, state, path)


class _Ranks(Struct, frozen=True):
    """The files of one pipeline stage, as tensor parallel rank `tp` sees them. A file is opened once."""

    directory: Path
    mesh: Mesh
    chunk: Chunk
    tp: int
    opened: dict[Path, Mapping[str, Any]] = field(default_factory=dict)

    def path(self, tp: int, ep: int) -> Path:
        """The file of a rank of this stage."""
        return rank_file(self.directory, self.mesh, tp=tp, pp=self.chunk.pp, ep=ep)

    def grid(self) -> dict[tuple[int, int], int]:
        """The expert tensor parallel rank of each (tp, ep) rank, in the smallest world that has them all."""
        mesh = self.mesh
        world = lcm(mesh.tp, mesh.ep * mesh.expert_tp)
        order = "tp-cp-ep-dp-pp"  # megatron-core's default
        dense = parallel_state.RankGenerator(mesh.tp, 1, world // mesh.tp, 1, 1, order)
        expert = parallel_state.RankGenerator(mesh.expert_tp, mesh.ep, world // (mesh.ep * mesh.expert_tp), 1, 1, order)

        def places(generator: parallel_state.RankGenerator, token: str) -> dict[int, int]:
            return {rank: place for group in generator.get_ranks(token) for place, rank in enumerate(group)}

        tp, ep, etp = places(dense, "tp"), places(expert, "ep"), places(expert, "tp")
        return {(tp[rank], ep[rank]): etp[rank] for rank in range(world)}

    def own_file(self) -> Path:
        """A file with the dense tensors of this rank: the first, which is the only one without expert parallelism."""
        paths = [self.path(tp, ep) for tp, ep in sorted(self.grid()) if tp == self.tp]
        return next((path for path in paths if path.is_file()), paths[0])

    def expert_file(self, ep: int, etp: int) -> Path:
        """A file with shard `etp` of the experts of rank `ep`: this rank's where it has them."""
        held = [place for place, shard in self.grid().items() if (place[1], shard) == (ep, etp)]
        paths = [self.path(*place) for place in sorted(held, key=lambda place: (place[0] != self.tp, place))]
        return next((path for path in paths if path.is_file()), paths[0])

    def state(self, path: Path) -> Mapping[str, Any]:
        """The state dict of the model chunk in a file."""
        if path not in self.opened:
            self.opened[path] = _model_chunk(_load_file(path), path, self.mesh, self.chunk.vpp)
        return self.opened[path]


def _dense(stored: Mapping[str, Any], chunk: Chunk) -> dict[str, Any]:
    """What is neither an expert nor part of multi-token prediction."""
    mtp = any(key.startswith("mtp.") for key in stored)
    return {
        key: value
        for key, value in stored.items()
        if not EXPERT.fullmatch(key)
        and not key.startswith("mtp.")
        and not (mtp and not chunk.embedding and key == EMBEDDING)
    }


def _cut_down_projections(state: dict[str, Any], model: GPTModel, tp: int) -> None:
    """Whole down projections, as Transformer Engine keeps them, become this rank's rows."""
    wanted = model.state_dict(keep_vars=True)
    for key, value in state.items():
        if key.endswith(DOWN_PROJECTIONS) and key in wanted and value.shape[0] != wanted[key].shape[0]:
            rows = wanted[key].shape[0]
            if value.shape[0] == rows * parallel_state.get_tensor_model_parallel_world_size():
                state[key] = value.narrow(0, tp * rows, rows)


def _experts(model: GPTModel, ranks: _Ranks) -> dict[str, torch.Tensor]:
    """All experts of this rank under their global numbers: its shard of each, from whichever files have it.

    Where the checkpoint is split over other expert tensor parallel ranks than the model, experts are put together and
    cut anew.
    """
    stored, size = ranks.mesh.expert_tp, parallel_state.get_expert_tensor_parallel_world_size()
    mine = parallel_state.get_expert_tensor_parallel_rank()
    each = model.config.num_moe_experts // ranks.mesh.ep
    gated = model.config.gated_linear_unit
    found: dict[str, torch.Tensor] = {}
    for ep in range(ranks.mesh.ep):
        shards: list[dict[str, torch.Tensor]] = []
        for etp in [mine] if stored == size else range(stored):
            path = ranks.expert_file(ep, etp)
            shards.append({})
            for key, value in ranks.state(path).items():
                if (match := EXPERT.fullmatch(key)) and not key.startswith("mtp."):
                    shards[-1].update(_one_by_one(match, value, ep * each, each, path))
        for key in shards[0]:
            parts = [shard[key] for shard in shards if key in shard]
            found[key] = parts[0] if stored == size else _cut(key, _joined(key, parts, gated), size, mine, gated)
    return found


def _one_by_one(
    match: re.Match[str], value: torch.Tensor, start: int, each: int, path: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """The experts in a stored tensor, under the local spec's names with global numbers."""
    name = match["at"] + "local_experts.{}." + (match["leaf"] or f"linear_fc{(match['transposed'] or '')[-1]}.weight")
    number = match["alone"] or match["grouped"]
    if number:
        if int(number) >= each:
            raise CheckpointError(
                "a rank has more experts than its share", where=f"{path}: {match[0]}", expected=f"{each} experts",
                found=f"number {number}", hint="copy all mp_rank folders from one save",
            )  # fmt: skip
        yield name.format(start + int(number)), value
        return
    if match["transposed"]:  # one tensor, [expert, in, out] in memory (moe/experts.py of 0.14, GroupedMLP)
        hidden_last = match["transposed"] == "weight2"
        shape = (each, -1, value.shape[1]) if hidden_last else (each, value.shape[0], -1)
        value = value.reshape(shape).transpose(1, 2)
    for index, expert in enumerate(value.unbind(0)):
        yield name.format(start + index), expert


def _joined(key: str, shards: list[torch.Tensor], gated: bool) -> torch.Tensor:
    """A whole tensor of an expert from its shards: rows of gate and up each, or columns."""
    if ".linear_fc2." in key:
        return shards[0] if key.endswith("bias") else torch.cat(shards, dim=1)
    parts = [shard.chunk(2 if gated else 1) for shard in shards]
    return torch.cat([part for half in zip(*parts, strict=True) for part in half])


def _cut(key: str, whole: torch.Tensor, size: int, rank: int, gated: bool) -> torch.Tensor:
    """One of `size` shards of a whole tensor of an expert."""
    if ".linear_fc2." in key:
        return whole if key.endswith("bias") else whole.chunk(size, dim=1)[rank]
    return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2 if gated else 1)])


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
        raise CheckpointError(
            "a rank's file does not exist", where=str(path), hint="copy the mp_rank folders of all ranks"
        )
    try:
        with _safe(path):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged zip or pickle raises almost anything
        raise CheckpointError(
            "a rank's file cannot be read",
            where=str(path),
            found=str(error).splitlines()[0],
            hint=GET_AGAIN,
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            "a rank's file is not a dict", where=str(path), found=type(content).__name__, hint=GET_AGAIN
        )
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
            hint="copy all mp_rank folders from one save",
        )
    return state


def local_name(key: str) -> str:
    """The name that the local layer spec has for a key of either spec."""
    for theirs, ours in TE_TO_LOCAL.items():
        if key.endswith("." + theirs):
            return key.removesuffix(theirs) + ours
    return key


def _local_names(stored: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """The weights of a state dict of either spec under the local spec's names."""
    seen: dict[str, str] = {}
    for key, value in stored.items():
        if key.endswith("._extra_state"):
            continue  # FP8 calibration of Transformer Engine, no weight
        name = local_name(key)
        if name in seen:
            raise CheckpointError(
                "a tensor is there under two names",
                where=f"{path}: {key}",
                found=f"{seen[name]} as well",
                hint="save it with one spec: Transformer Engine's or the local one",
            )
        seen[name] = key
        yield name, value


def _load_legacy(model: GPTModel, state: Mapping[str, Any], path: Path) -> None:
    # As strict=True, but for _extra_state, which the local spec asks for without having any.
    try:
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError) as error:  # another shape, or not a tensor
        lines = [line.strip() for line in str(error).splitlines()[1:] if "_extra_state" not in line]
        raise CheckpointError(
            "a rank's weights do not fit the model",
            where=str(path),
            details=_few(lines or [str(error)]),
            hint="`shardtool inspect` shows what does not fit",
        ) from error
    missing = [key for key in result.missing_keys if not key.endswith("._extra_state")]
    details = []
    for what, keys in (("missing", missing), ("unexpected", result.unexpected_keys)):
        details += [f"{what}: {line}" for line in _few(_folded(keys))]
    if details:
        raise CheckpointError(
            "a rank's file and the model have different tensors",
            where=str(path),
            details=tuple(details),
            hint="`shardtool inspect` shows what does not fit",
        )


def _folded(keys: list[str]) -> list[str]:
    """Key names with the layer's and the expert's number as *, each once."""
    return list(dict.fromkeys(re.sub(r"(?<=layers\.)\d+|(?<=experts\.)\d+", "*", key) for key in keys))


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
            if dist_metadata.content_metadata(metadata)["non_homogeneous_layers"]:
                # a run with a list as its --moe-layer-freq, even one of all ones, asks for a key per layer
                content = {**(content or {}), "non_homogeneous_layers": True}
            sharded = model.sharded_state_dict(metadata=content)
            _ask_for_fused_norms(sharded, metadata)
            # The access check wants every layer to be asked for by some rank; one stage of several asks for its own.
            state = dist_checkpointing.load(sharded, str(place), validate_access_integrity=single)
        except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
            raise _load_error(error, directory) from error
    state = {key: value for key, value in state.items() if isinstance(key, str) and key in sharded}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _load_error(error, directory) from error


def _ask_for_fused_norms(sharded: Mapping[str, Any], metadata: Any) -> None:
    """Ask for a norm under Transformer Engine's key where the checkpoint has it under that one only.

    The local spec (to 0.19) has the fused norm's key for the norm before experts, which Transformer Engine does not
    fuse, and unfused keys for latent attention's norms, which Transformer Engine fuses (gpt_layer_specs.py).
    """
    held = metadata.state_dict_metadata
    for tensor in sharded.values():
        if isinstance(tensor, ShardedTensor) and tensor.key not in held:
            for local, fused in DIST_NORMS:
                if local in tensor.key and (key := tensor.key.replace(local, fused)) in held:
                    tensor.key = key


def _load_error(error: BaseException, directory: Path) -> CheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)] or lines[:SHOWN]
    # a missing key's error goes on with all keys that there are
    details = list(dict.fromkeys(line if len(line) <= 300 else line[:300] + " ..." for line in reason))
    details = details or [type(error).__name__]
    return CheckpointError(
        "megatron-core cannot load the checkpoint",
        where=str(directory),
        details=_few(details),
        hint="`shardtool inspect` shows what does not fit",
    )


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
