"""Which expert tensor parallel size the per-rank files of a checkpoint were saved with.

A file's name has a tensor and an expert parallel rank, none of the expert tensor parallel one. Megatron-LM's args say it
(`expert_tensor_parallel_size`), where they are those of the run and name it at all; the shapes of the experts say it too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from shardtool.errors import CheckpointError, UsageError
from shardtool.layout.megatron import held_ranks
from shardtool.layout.mesh import Mesh

Shape = tuple[int, ...]

FC2 = re.compile(r".*\.experts\.(local_experts\.\d+\.)?linear_fc2\.weight\d*")
TRANSPOSED_FC2 = re.compile(r".*\.experts\.weight2")


def stored_expert_tp(
    shapes: Mapping[str, Shape],
    args: Mapping[str, Any],
    mesh: Mesh,
    files: Collection[tuple[int, int, int]],
    where: str,
) -> int | None:
    """The `etp` of a mesh, from the rows of an expert on one rank and the size that the args give it.

    Where the args give no size, or one that does not fit, their own `expert_tensor_parallel_size` decides; without that
    it is None, the same as tp. `shapes` are those of the tensors of all ranks, `files` the (tp, pp, ep) that exist.
    CheckpointError where a shard of the experts is in no file.
    """
    declared = args.get("expert_tensor_parallel_size")
    declared = declared if isinstance(declared, int) and declared > 0 else None
    whole, local = args.get("moe_ffn_hidden_size") or args.get("ffn_hidden_size"), _local_size(shapes)
    shown = whole // local if isinstance(whole, int) and local and whole % local == 0 else None
    missing: dict[int, list[str]] = {}
    for etp in (shown, declared, mesh.tp):
        if etp is None or etp in missing:
            continue
        missing[etp] = _missing(Mesh(tp=mesh.tp, pp=mesh.pp, ep=mesh.ep, etp=etp), files)
        if not missing[etp]:
            return None if etp == mesh.tp and declared is None else etp
    etp = next(iter(missing))
    raise CheckpointError(
        "shards of the experts are missing",
        where=where,
        expected=f"a file for each of ep {mesh.ep} x etp {etp} shards in every pipeline stage",
        found=f"no file for {', '.join(missing[etp][:6])}",
        hint="copy the mp_rank folders of all ranks; the args' expert_tensor_parallel_size and moe_ffn_hidden_size say"
        " how experts are cut",
    )


def _local_size(shapes: Mapping[str, Shape]) -> int | None:
    """The size of an expert on one rank: the columns of its second linear."""
    for name, shape in shapes.items():
        if FC2.fullmatch(name) and len(shape) > 1:
            return shape[-1]
        if TRANSPOSED_FC2.fullmatch(name) and len(shape) > 1:
            return shape[-2]
    return None


def _missing(mesh: Mesh, files: Collection[tuple[int, int, int]]) -> list[str]:
    """The expert shards that no file has, if this is the mesh."""
    found: list[str] = []
    for stage in range(mesh.pp):
        try:
            ranks = held_ranks(mesh, [(tp, ep) for tp, pp, ep in files if pp == stage])
        except UsageError as error:
            return [error.what]
        held = {(ep, etp) for (_, ep), etp in ranks.items()}
        wanted = [(ep, etp) for ep in range(mesh.ep) for etp in range(mesh.expert_tp)]
        found += [f"pp {stage} ep {ep} etp {etp}" for ep, etp in wanted if (ep, etp) not in held]
    return found
