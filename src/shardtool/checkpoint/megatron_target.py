"""Megatron checkpoints, laid out for writing: per-rank files (`torch`) and `torch_dist`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Any

from shardtool.checkpoint.target import Places, Skeletons, Target, TargetTensor
from shardtool.families.architecture import Architecture
from shardtool.formats import megatron_legacy, torch_dist_out
from shardtool.formats.stored import Skeleton
from shardtool.formats.torch_dist import METADATA, ChunkRef, Extent, GlobalTensor
from shardtool.layout.layout import Key, Layout
from shardtool.layout.megatron import dist_name, rank_grid
from shardtool.layout.mesh import Mesh
from shardtool.layout.rules import Rule

METADATA_JSON_FILE = "metadata.json"
COMMON_FILE = "common.pt"
LINEARS = ("eh_proj", "in_proj", "out_proj")  # those whose names do not say that they are


def rank_files(mesh: Mesh, *, experts: bool = False) -> dict[tuple[int, int, int], str]:
    """The file of each (tp rank, pipeline stage, ep rank) that exists.

    With experts and etp other than tp these are the combinations that occur on some rank (layout.megatron.rank_grid).
    """
    grid = rank_grid(mesh) if experts else {(tp, ep): tp for ep in range(mesh.ep) for tp in range(mesh.tp)}
    name = megatron_legacy.rank_name
    return {
        (tp, pp, ep): f"{name(tp, pp, ep, mesh.pp, mesh.ep)}/{megatron_legacy.FILE_NAME}"
        for tp, ep in grid
        for pp in range(mesh.pp)
    }


def legacy_target(
    tensors: Sequence[TargetTensor],
    args: Mapping[str, Any],
    files: Mapping[tuple[int, int, int], str],
    virtual: int,
    iteration: int,
    spec: str,
    residues: Mapping[Key, int] | None = None,
) -> Target:
    """One model_optim_rng.pt per rank; every rank of the mesh gets a file, also one without tensors.

    As Megatron-LM's, its args hold the rank of the process, so that exchanged files are noticed. `residues` are places
    of payloads (TensorOut).
    """
    by_file: dict[str, list[list[TargetTensor]]] = {file: [[] for _ in range(virtual)] for file in files.values()}
    ranks = {file: tp + args["tensor_model_parallel_size"] * pp for (tp, pp, _), file in files.items()}
    for tensor in tensors:
        by_file[tensor.key[0]][tensor.key[2][0]].append(tensor)

    def skeleton(file: str) -> Skeleton:
        specs = [[(tensor.key[1], tensor.shape, tensor.dtype) for tensor in chunk] for chunk in by_file[file]]
        extra = [_extra_states([name for name, _, _ in chunk], spec) for chunk in specs]
        held = {**args, "iteration": iteration, "rank": ranks[file]}
        wanted = {
            (number, tensor.key[1]): residues[tensor.key]
            for number, chunk in enumerate(by_file[file] if residues else ())
            for tensor in chunk
            if residues and tensor.key in residues
        }
        return megatron_legacy.rank_skeleton(held, specs, iteration, extra, wanted)

    places = Places(tensors, lambda key: (key[2][0], key[1]))
    return Target(Skeletons({file: partial(skeleton, file) for file in by_file}), places)


def _extra_states(names: Sequence[str], spec: str) -> list[str]:
    """The `_extra_state` keys beside these weights: of all linears, and of Transformer Engine's norms (since 1.13).

    Grouped experts (`linear_fc1.weight3`) have one for all experts of a linear.
    """
    found: dict[str, None] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        kind = module.rpartition(".")[2]
        linear = kind.startswith("linear_") or kind == "output_layer" or kind in LINEARS
        if re.fullmatch(r"weight\d*", leaf) and (linear or (spec == "te" and kind.endswith("norm"))):
            found[module + "._extra_state"] = None
    return list(found)


def dist_target(
    tensors: Sequence[TargetTensor],
    layout: Layout,
    args: Mapping[str, Any],
    a: Architecture,
    iteration: int,
    residues: Mapping[Key, int] | None = None,
) -> Target:
    """The .distcp files of all ranks, `.metadata`, `common.pt`, and `metadata.json` last: it marks a finished save.

    `_extra_state` objects are written for every module that the TE or the local spec asks for: without them
    megatron-core's default strictness refuses to load (dist_checkpointing/validation.py).
    """
    by_file: dict[str, list[TargetTensor]] = defaultdict(list)
    for tensor in tensors:
        by_file[tensor.key[0]].append(tensor)
    objects_file = "__0_1.distcp"

    @cache
    def shard(file: str) -> tuple[Skeleton, list[tuple[int, int]]]:
        held = [(tensor.key[1], tensor.key[2], _chunk_sizes(tensor), tensor.dtype) for tensor in by_file[file]]
        wanted = (
            {tensor.key[1:]: residues[tensor.key] for tensor in by_file[file] if tensor.key in residues}
            if residues
            else {}
        )
        return torch_dist_out.data_file_skeleton(held, residues=wanted)

    @cache
    def states() -> tuple[Skeleton, dict[str, Extent]]:
        blob, names = torch_dist_out.extra_state_blob(), _extra_objects(layout.rules, a)
        skeleton, extents = torch_dist_out.data_file_skeleton([], [(name, blob) for name in names])
        return skeleton, {name: Extent(objects_file, *extent) for name, extent in zip(names, extents, strict=True)}

    @cache
    def metadata() -> bytes:
        extents = {file: shard(file)[1] for file in by_file}
        return torch_dist_out.metadata_bytes(_global_tensors(by_file, extents), states()[1])

    makers: dict[str, Callable[[], Skeleton]] = {file: partial(_first, partial(shard, file)) for file in by_file}
    places = Places(tensors, lambda key: key[1:])
    last: dict[str, Callable[[], bytes]] = {
        METADATA: metadata,
        COMMON_FILE: lambda: torch_dist_out.common_bytes({**args, "iteration": iteration}, iteration),
        METADATA_JSON_FILE: lambda: torch_dist_out.METADATA_JSON,
    }
    return Target(Skeletons({**makers, objects_file: partial(_first, states)}), places, last)


def _first(make: Callable[[], tuple[Skeleton, object]]) -> Skeleton:
    return make()[0]


def _chunk_sizes(tensor: TargetTensor) -> tuple[int, ...]:
    """A stacked tensor's chunk has the layers' dim, of size 1; in the layout the layer is part of the key."""
    return (1,) * (len(tensor.key[2]) - len(tensor.shape)) + tensor.shape


def _global_tensors(
    by_file: Mapping[str, Sequence[TargetTensor]], extents: Mapping[str, Sequence[tuple[int, int]]]
) -> dict[str, GlobalTensor]:
    """What `.metadata` says of the tensors, from the (position, length) of each chunk's blob in its file."""
    chunks: dict[str, list[ChunkRef]] = defaultdict(list)
    for file, tensors in by_file.items():
        for tensor, place in zip(tensors, extents[file], strict=True):
            chunks[tensor.key[1]].append(
                ChunkRef(tensor.key[2], _chunk_sizes(tensor), tensor.dtype, Extent(file, *place), tensor.key[1])
            )
    return {
        name: GlobalTensor(
            tuple(max(chunk.offsets[dim] + chunk.sizes[dim] for chunk in held) for dim in range(len(held[0].sizes))),
            held[0].dtype,
            tuple(held),
        )
        for name, held in chunks.items()
    }


def _extra_objects(rules: Sequence[Rule], a: Architecture) -> list[str]:
    """The `_extra_state` objects: a superset of what any spec or Transformer Engine version asks for.

    One per module and layer; one per expert of a grouped linear (te: transformer_engine.py, 0.16.1, TEGroupedLinear).
    """
    names: dict[str, None] = {}
    for rule in sorted(rules, key=lambda rule: rule.megatron):  # the same files, whatever the family's table
        for key in (rule.megatron, *rule.dist_aliases):
            module, _, leaf = key.rpartition(".")
            kind = module.rpartition(".")[2]
            if (
                leaf in ("weight", "weight{e}")
                and (kind.startswith("linear_") or kind.endswith("norm") or kind in LINEARS)
            ) or leaf == "layer_norm_weight":
                names.update(dict.fromkeys(_extra_instances(rule, module, a)))
    return list(names)


def _extra_instances(rule: Rule, module: str, a: Architecture) -> Iterator[str]:
    name = dist_name(module + ".weight{e}" if rule.per_expert else module, stacked=a.uniform)
    name = name.removesuffix(".weight")
    layers: Sequence[int] = rule.ids(a.num_layers) if rule.per_layer else range(max(1, a.mtp_layers))
    stacked_layers = rule.per_layer and a.uniform
    experts: Sequence[int] = range(a.moe.num_experts) if rule.per_expert and a.moe else (0,)
    for layer, expert in product(layers if rule.per_layer or rule.per_mtp else (0,), experts):
        place = [(layer, a.num_layers)] if stacked_layers else []
        place += [(expert, a.moe.num_experts)] if rule.per_expert and a.moe else []
        at, of = [".".join(str(pair[side]) for pair in place) for side in (0, 1)] if place else ("0", "1")
        yield f"{name}._extra_state/shard_{at}_{of}".replace("{l}", str(layer)).replace("{m}", str(layer))
