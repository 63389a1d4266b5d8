"""Megatron checkpoints, opened for reading: per-rank files (`torch`) and `torch_dist`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from shardtool.checkpoint.consistency import check_args, check_ranks, check_save
from shardtool.checkpoint.expert_ranks import stored_expert_tp
from shardtool.checkpoint.opened import Header, Opened, account, fold, mismatch
from shardtool.checkpoint.spellings import global_tensors, rank_tensors, spelling
from shardtool.errors import CheckpointError, located, no_embedding, too_few_rows
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import EMBEDDING, axis_sizes, standard
from shardtool.families.megatron_args import from_args, mesh_from_args
from shardtool.formats import megatron_legacy, torch_dist
from shardtool.formats.stored import Stored
from shardtool.formats.tracker import Iteration, find_iteration
from shardtool.layout.chunks import chunked_layout, per_layer_keys
from shardtool.layout.layout import Key, Layout, centred
from shardtool.layout.megatron import STACKED_PREFIX, Spelling, dist_name, legacy_layout
from shardtool.layout.mesh import Chunk, Mesh
from shardtool.layout.rules import Rule

# in old per-rank files; computed, never trained
IGNORED = (r"(decoder\.)?rotary_pos_emb\.inv_freq", r".*\._extra_state.*")
# beside the model in torch_dist; the model's own state only is converted
NOT_MODEL = re.compile(r"(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param_scheduler)([./].*)?")


class Megatron(Struct, frozen=True):
    """A Megatron checkpoint: what its args say, how it is laid out, and its tensors by key."""

    path: Path
    save: Iteration
    format: str  # "torch" or "torch_dist"
    args: Mapping[str, Any]
    architecture: Architecture
    mesh: Mesh
    chunks: tuple[Chunk, ...]  # empty for torch_dist, which has none
    spelling: Spelling
    padded_vocab: int
    headers: Mapping[Key, Header]
    locate: Callable[[Key], Stored]
    files: Mapping[tuple[int, int, int], str]
    global_shapes: Mapping[str, tuple[int, ...]]
    ignored: tuple[str, ...]  # no weights: _extra_state and buffers
    not_converted: tuple[str, ...]  # state beside the model: optimizer, rng, ...
    place: Callable[[Key], tuple[str, int]] | None = None  # see Opened

    @property
    def dtype(self) -> str:
        """The dtype of the input embedding, which is the model's."""
        return next(header.dtype for key, header in self.headers.items() if key[1].endswith(EMBEDDING))

    @property
    def spec(self) -> str:
        """The layer spec whose names the checkpoint has: te or local."""
        return self.spelling.spec

    def layout(self, rules: tuple[Rule, ...], sizes: Mapping[str, int]) -> Layout:
        """Where the components of these rules live in it."""
        found = self._layout(rules, sizes)
        return centred(found) if self.architecture.centred_norms else found

    def _layout(self, rules: tuple[Rule, ...], sizes: Mapping[str, int]) -> Layout:
        if self.format == "torch":
            return legacy_layout(rules, sizes, self.padded_vocab, self.chunks, self.mesh, self.spelling, self.files)
        boxes: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for (_, name, offsets), header in self.headers.items():
            leading = (1,) * (len(offsets) - len(header.shape))
            boxes.setdefault(name, []).append((offsets, leading + header.shape))
        return chunked_layout(rules, sizes, self.padded_vocab, boxes)

    def open(self, rules: tuple[Rule, ...] | None = None, vocab_size: int | None = None) -> Opened:
        """Account for every tensor. `rules` default to the Megatron side of the model; `vocab_size` to that of the args.

        CheckpointError where the tensors are not those of the model that the args describe.
        """
        a = self.architecture if vocab_size is None else replace(self.architecture, vocab_size=vocab_size)
        if a.vocab_size > self.padded_vocab:
            raise too_few_rows(f"{self.save.directory}: {EMBEDDING}", a.vocab_size, self.padded_vocab)
        rules = rules or standard(a)
        self._check_global_shapes(rules, a)
        layout = self.layout(rules, axis_sizes(a))
        ignored = account(layout, self.headers, str(self.save.directory), IGNORED)
        headers = {key: self.headers[key] for piece in layout.pieces for key in piece.all_keys()}
        return Opened(self.path, a, layout, headers, self.locate, (*self.ignored, *ignored), self.place)

    def _check_global_shapes(self, rules: tuple[Rule, ...], a: Architecture) -> None:
        """torch_dist: the whole tensors have the shapes of the model; chunks alone could hide a missing layer."""
        wrong = self.wrong_global_shapes(rules, a)
        if wrong:
            lines = fold(
                f"wrong shape: {name}: expected {list(expected)}, found {list(found)}"
                for name, (_, expected, found) in wrong.items()
            )
            raise mismatch(f"{len(wrong)} of a wrong shape", str(self.save.directory), lines)

    def wrong_global_shapes(
        self, rules: tuple[Rule, ...], a: Architecture
    ) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """torch_dist: the number of the rule, the expected and the found shape of each whole tensor where they differ."""
        sizes = {**axis_sizes(a), "v": self.padded_vocab}
        wrong = {}
        for number, rule, part in [(at, each, part) for at, each in enumerate(rules) for part in each.parts]:
            shape = (*((sizes["e"],) if rule.per_expert else ()), *part.tensor.shape(sizes))
            wanted = {}
            for base in (rule.megatron, *rule.dist_aliases, *(key for key, _ in rule.derived)):
                key = base + part.ending
                one = dist_name(key, stacked=False)
                if rule.per_layer:
                    wanted[dist_name(key, stacked=True)] = (a.num_layers, *shape)
                    wanted |= {one.replace("{l}", str(layer)): shape for layer in rule.ids(a.num_layers)}
                else:
                    wanted |= {one.replace("{m}", str(layer)): shape for layer in range(max(1, a.mtp_layers))}
            for name, expected in wanted.items():
                found = self.global_shapes.get(name, expected)
                if found != expected:
                    wrong[name] = (number, expected, found)
        return wrong


def read_megatron(path: Path) -> Megatron:
    """Read the headers and args of a checkpoint (a root with a tracker file, or one save's directory).

    CheckpointError where files are missing or broken, or where the args do not say what the model is.
    """
    save = find_iteration(path)
    if any(entry.name.startswith("mp_rank_") for entry in save.directory.iterdir()):
        return _read_legacy(path, save)
    return _read_dist(path, save)


def _read_legacy(path: Path, save: Iteration) -> Megatron:
    ranks = megatron_legacy.read_ranks(save.directory)
    first, where = ranks[min(ranks)], str(save.directory)
    args = check_args(first.args, first.path)
    check_ranks(ranks, args)
    check_save(save, first.iteration, first.checkpoint_version, first.path)
    mesh = mesh_from_args(args)
    mesh = replace(mesh, **{axis: 1 + max(getattr(rank, axis) for rank in ranks) for axis in ("tp", "pp", "ep")})
    experts = _num_experts(ranks, args)
    headers: dict[Key, Header] = {}
    stored: dict[Key, Stored] = {}
    files: dict[tuple[int, int, int], str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, file in ranks.items():
        name = files[rank.tp, rank.pp, rank.ep] = str(Path(file.path).relative_to(save.directory))
        for number, chunk in enumerate(file.chunks):
            for tensor, item in rank_tensors(chunk, experts, mesh.tp, mesh.ep, file.path).items():
                headers[name, tensor, (number,)] = Header(item.shape, item.dtype)
                stored[name, tensor, (number,)] = item
                shapes[tensor] = item.shape
    architecture = _architecture(args, first.path)
    chunks = _chunks(ranks, mesh, architecture.num_layers, where)
    mesh = replace(mesh, vpp=1 + max(chunk.vpp for chunk in chunks))
    if experts:
        mesh = replace(mesh, etp=stored_expert_tp(shapes, args, mesh, files, where))
    embedding = next((header for key, header in headers.items() if key[1] == EMBEDDING), None)
    if embedding is None or len(embedding.shape) != 2:
        raise no_embedding(first.path)
    padded = embedding.shape[0] * mesh.tp
    iteration = first.iteration if save.iteration is None else save.iteration
    save = replace(save, iteration=None if save.release else iteration)
    ignored = tuple(sorted({entry for file in ranks.values() for entry in file.ignored}))
    other = tuple(
        key for key in first.other_keys
        if key not in ("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far")
    )  # fmt: skip
    return Megatron(
        path, save, "torch", args, _vocabulary(architecture, args, padded), mesh, chunks, spelling(shapes), padded,
        headers, stored.__getitem__, files, {}, ignored, other,
    )  # fmt: skip


def _architecture(args: Mapping[str, Any], path: str) -> Architecture:
    with located("args", f"{path}: args"):
        return from_args(args)


def _num_experts(ranks: Mapping[megatron_legacy.Rank, megatron_legacy.RankFile], args: Mapping[str, Any]) -> int:
    """The number of experts, 0 for a dense model: as a router has rows, else as the args say."""
    for file in ranks.values():
        for chunk in file.chunks:
            for name, item in chunk.items():
                if name.endswith(".mlp.router.weight"):
                    return item.shape[0]
    count = args.get("num_experts")
    return count if isinstance(count, int) else 0


def _vocabulary(a: Architecture, args: Mapping[str, Any], padded: int) -> Architecture:
    """The true vocabulary size of the args; without one, every stored row counts as a token."""
    return a if args.get("vocab_size") else replace(a, vocab_size=padded)


def _chunks(
    ranks: Mapping[megatron_legacy.Rank, megatron_legacy.RankFile], mesh: Mesh, num_layers: int, where: str
) -> tuple[Chunk, ...]:
    """The model chunks as the files have them: layers are numbered on in the order (virtual stage, pipeline stage)."""
    count = max(len(file.chunks) for file in ranks.values())
    found, start = [], 0
    for vpp in range(count):
        for pp in range(mesh.pp):
            chunks = next(file for rank, file in sorted(ranks.items()) if rank.pp == pp).chunks
            names = chunks[vpp] if vpp < len(chunks) else {}
            matches = (re.match(r"decoder\.layers\.(\d+)\.", name) for name in names)
            local = {int(match[1]) for match in matches if match}
            size = 1 + max(local, default=-1)
            last = (vpp, pp) == (count - 1, mesh.pp - 1)
            mtp = any(name.startswith("mtp.") for name in names)
            found.append(Chunk(pp, vpp, tuple(range(start, start + size)), (vpp, pp) == (0, 0), last, mtp))
            start += size
    if start != num_layers:
        stages = ", ".join(f"stage {chunk.pp}: {len(chunk.layers)}" for chunk in found)
        raise CheckpointError(
            "the files do not hold all layers",
            where=where,
            expected=f"{num_layers} layers",
            found=f"{start} ({stages})",
            hint="copy all files of the save again, or correct num_layers in the args",
        )
    return tuple(found)


def _read_dist(path: Path, save: Iteration) -> Megatron:
    metadata = torch_dist.read_metadata(save.directory)
    common = torch_dist.read_common(save.directory, metadata)
    common_args = common.get("args")
    file = save.directory / torch_dist.COMMON_FILE
    where = str(file if file.exists() else save.directory / torch_dist.METADATA)
    args = check_args(common_args if isinstance(common_args, dict) else None, where)
    check_save(save, common.get("iteration"), common.get("checkpoint_version"), where)
    headers: dict[Key, Header] = {}
    refs: dict[Key, torch_dist.ChunkRef] = {}
    names = {full: full.removeprefix(metadata.prefix) for full in metadata.tensors}
    other = [name for name in names.values() if NOT_MODEL.fullmatch(name)]
    model = {name: metadata.tensors[full] for full, name in names.items() if not NOT_MODEL.fullmatch(name)}
    tensors = global_tensors(model, str(save.directory / torch_dist.METADATA))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    by_layer = per_layer_keys(tensors)
    for name, tensor in tensors.items():
        leading = (name.startswith(STACKED_PREFIX) and not by_layer) + (".experts.experts." in name)
        for part in tensor.parts:
            key: Key = ("", name, part.offsets)
            single = all(size == 1 for size in part.sizes[:leading])
            headers[key] = Header(part.sizes[leading:] if single else part.sizes, part.chunk.dtype)
            refs[key] = part.chunk
    if len(shapes.get(EMBEDDING, ())) != 2:
        raise no_embedding(str(save.directory / torch_dist.METADATA))
    objects = [name for name in metadata.objects if "_extra_state" in name]
    others = sorted({name.split("/")[0] for name in metadata.objects if "_extra_state" not in name})
    groups = sorted({name.split(".")[0] for name in other} | {name for name in others if name != "common_state"})
    iteration = common.get("iteration") if save.iteration is None else save.iteration
    with located("args", f"{where}: args"):
        architecture = from_args(args)
    padded = shapes[EMBEDDING][0]
    return Megatron(
        path, replace(save, iteration=None if save.release else iteration), "torch_dist", args,
        _vocabulary(architecture, args, padded), mesh_from_args(args), (),
        Spelling(_dist_spec(shapes, args)), padded, headers,
        lambda key: torch_dist.chunk_payload(refs[key]), {}, shapes, tuple(objects), tuple(groups),
        lambda key: (refs[key].blob.file, refs[key].blob.offset),
    )  # fmt: skip


def _dist_spec(names: Iterable[str], args: Mapping[str, Any]) -> str:
    """The layer spec that saved a checkpoint: as its norms are named, where they tell, else as the args say.

    Transformer Engine's keys have latent attention's norms fused and the norm before experts alone, the local spec's
    the other way round; a converted checkpoint has both.
    """
    held = set(names)
    te = any(name.endswith("_up_proj.layer_norm_weight") for name in held)
    local = any(name.endswith(".self_attention.kv_layernorm.weight") for name in held)
    for router in [] if te or local else [name for name in held if name.endswith(".mlp.router.weight")]:
        layer = router.removesuffix("mlp.router.weight")
        te |= layer + "pre_mlp_layernorm.weight" in held
        local |= layer + "mlp.linear_fc1.layer_norm_weight" in held
    if te != local:
        return "te" if te else "local"
    return "local" if args.get("transformer_impl") == "local" else "te"
