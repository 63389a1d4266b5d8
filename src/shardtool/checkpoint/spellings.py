"""Tensors of Megatron checkpoints under the names and shapes that rules have, whatever version wrote them.

Per-rank files: legacy grouped experts, latent attention's fused down projections. torch_dist: gate and up under keys of
their own, one key per expert. A tensor that is cut or put together here is still where it was on disk.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from math import prod

from msgspec import Struct
from msgspec.structs import replace

from shardtool.errors import GET_AGAIN, CheckpointError
from shardtool.formats.stored import ITEMSIZE, Stored
from shardtool.formats.torch_dist import ChunkRef, GlobalTensor
from shardtool.layout.megatron import MTP_INNER, Spelling

Shape = tuple[int, ...]

FUSED_DOWN = "self_attention.linear_qkv_down_proj."
Q_DOWN, KV_DOWN = "self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight"
Q_UP, KV_UP = "self_attention.linear_q_up_proj.weight", "self_attention.linear_kv_up_proj.weight"


def spelling(tensors: Mapping[str, Shape]) -> Spelling:
    """The spelling of per-rank files, from the names and shapes of one rank's tensors or of all ranks'."""

    def some(part: str) -> bool:
        return any(part in name for name in tensors)

    spec = "te" if some(".linear_qkv.layer_norm_") or some("_proj.layer_norm_") else "local"
    experts = "grouped"
    if some(".local_experts."):
        experts = "sequential"
    elif some(".experts.weight1"):
        experts = "transposed"
    elif any(name.endswith(".experts.linear_fc1.weight") for name in tensors):
        experts = "single"
    mtp = "transformer_layer" if some(MTP_INNER) else "mtp_model_layer"
    return Spelling(spec, experts, mtp, _down_projections_are_cut(tensors))


def _down_projections_are_cut(tensors: Mapping[str, Shape]) -> bool | None:
    """Whether a rank holds only a part of latent attention's down projections; None without any.

    Whole, the key-value one has more rows than the rank of what follows it (it has the shared rope dims besides). Cut
    into two or more, it has fewer: the rope dims are fewer than the rank.
    """
    for name, shape in tensors.items():
        if name.endswith(KV_DOWN) and (up := tensors.get(name.removesuffix(KV_DOWN) + KV_UP)) and len(up) == 2:
            return shape[0] <= up[1]
    return None


def rank_tensors(tensors: Mapping[str, Stored], num_experts: int, tp: int, ep: int, where: str) -> dict[str, Stored]:
    """One model chunk of one rank's file, under the names and shapes that the layout of per-rank files has.

    `num_experts` is the number over all ranks. CheckpointError where a fused tensor has no fitting shape.
    """
    found: dict[str, Stored] = {}
    for name, item in tensors.items():
        if FUSED_DOWN in name:
            found |= _unfused(name, item, tensors, tp, where)
        else:
            shape = _experts_first(name, item.shape, num_experts // ep)
            found[name] = item if shape == item.shape else replace(item, shape=shape)
    return found


def _experts_first(name: str, shape: Shape, local: int) -> Shape:
    """The shape of a tensor as it lies in memory: legacy grouped experts are [experts, in, out] under a nominal 2-D shape.

    megatron-core 0.14 transformer/moe/experts.py (GroupedMLP): weight1 [h, e * 2 x] is view(e, h, 2 x), weight2
    [e * x, h] is view(e, x, h). `local` is the number of experts of a rank.
    """
    if len(shape) != 2 or local < 1:
        return shape
    if name.endswith(".experts.weight1") and shape[1] % local == 0:
        return (local, shape[0], shape[1] // local)
    if name.endswith(".experts.weight2") and shape[0] % local == 0:
        return (local, shape[0] // local, shape[1])
    return shape


def _unfused(name: str, item: Stored, tensors: Mapping[str, Stored], tp: int, where: str) -> dict[str, Stored]:
    """Latent attention's two down projections out of one tensor, and the norm before it under its own name.

    megatron-core 0.17 and newer with mla_down_proj_fusion (multi_latent_attention.py, FusedMLASelfAttention): each rank
    has its rows of the query part, then its rows of the key-value part; the input norm is fused into the linear.
    """
    layer, _, leaf = name.partition(FUSED_DOWN)
    if leaf.startswith("layer_norm_"):
        return {f"{layer}input_layernorm.{leaf.removeprefix('layer_norm_')}": item}
    q_up, kv_up = tensors.get(layer + Q_UP), tensors.get(layer + KV_UP)
    if leaf != "weight" or q_up is None or kv_up is None or {len(part.shape) for part in (item, q_up, kv_up)} != {2}:
        return {name: item}  # the accounting names it
    ranks = q_up.shape[1], kv_up.shape[1]
    whole = item.shape[0] > sum(ranks)  # as in _down_projections_are_cut
    if not whole and ranks[0] % tp:
        raise CheckpointError(
            "the fused down projection cannot be cut", where=f"{where}: {name}",
            expected=f"a query rank that tp {tp} divides", found=f"query rank {ranks[0]}",
            hint="save it with megatron-core in the layout that it was trained in",
        )  # fmt: skip
    rows = ranks[0] if whole else ranks[0] // tp
    return {layer + Q_DOWN: _rows(item, 0, rows), layer + KV_DOWN: _rows(item, rows, item.shape[0])}


def _rows(item: Stored, low: int, high: int) -> Stored:
    """Rows [low, high) of a stored tensor, which stay where they are."""
    stride = prod(item.shape[1:]) if item.strides is None else item.strides[0]
    offset = item.offset + low * stride * ITEMSIZE[item.dtype]
    return replace(item, offset=offset, shape=(high - low, *item.shape[1:]))


# --- torch_dist ------------------------------------------------------------------------------------------------------

ONE_EXPERT = re.compile(r"(.*\.experts\.experts\.)(\d+)\.(.*)")


class Part(Struct, frozen=True):
    """Elements [offsets, offsets + sizes) of a global tensor, and the chunk on disk that holds them."""

    offsets: Shape
    sizes: Shape
    chunk: ChunkRef


class Whole(Struct, frozen=True):
    """A global tensor: its shape, and the parts that tile it."""

    shape: Shape
    parts: tuple[Part, ...]


def global_tensors(tensors: Mapping[str, GlobalTensor], where: str) -> dict[str, Whole]:
    """The tensors of a torch_dist checkpoint under the keys that rules have.

    Saved with singleton_local_shards, gate and up have keys of their own (`weight_w`, `weight_v`) and every expert has
    (`experts.experts.3.linear_fc1.weight_w`): megatron-core 0.14 and newer, mlp.py apply_swiglu_sharded_factory and
    moe/experts.py. CheckpointError where the halves or the experts do not fit together.
    """
    found: dict[str, Whole] = {}
    experts: dict[str, dict[int, Whole]] = defaultdict(dict)
    for name, tensor in tensors.items():
        base, half = name[:-2], name[-2:]
        paired = half in ("_w", "_v") and base + "_w" in tensors and base + "_v" in tensors
        if paired and half == "_v":
            continue
        one = Whole(tensor.shape, tuple(Part(chunk.offsets, chunk.sizes, chunk) for chunk in tensor.chunks))
        if paired:
            one = _side_by_side(where, name, one, tensors[base + "_v"])
        key = base if paired else name
        if match := ONE_EXPERT.fullmatch(key):
            experts[match[1] + match[3]][int(match[2])] = one
        else:
            found[key] = one
    return found | {name: _stacked(where, name, held) for name, held in experts.items()}


def _side_by_side(where: str, name: str, gate: Whole, up: GlobalTensor) -> Whole:
    """Gate rows, then up rows. The keys of such a save are per layer, so the rows are the first dim."""
    if gate.shape != up.shape or not gate.shape:
        raise CheckpointError(
            "the halves of a gated linear differ in shape", where=f"{where}: {name}", expected=str(list(gate.shape)),
            found=str(list(up.shape)),
            hint=GET_AGAIN,
        )  # fmt: skip
    rows = gate.shape[0]
    moved = tuple(Part((chunk.offsets[0] + rows, *chunk.offsets[1:]), chunk.sizes, chunk) for chunk in up.chunks)
    return Whole((2 * rows, *gate.shape[1:]), (*gate.parts, *moved))


def _stacked(where: str, name: str, experts: Mapping[int, Whole]) -> Whole:
    """Experts under keys of their own as one tensor with a leading dim of experts."""
    shapes = {tensor.shape for tensor in experts.values()}
    if set(experts) != set(range(len(experts))) or len(shapes) > 1:
        raise CheckpointError(
            "the experts do not make one tensor", where=f"{where}: {name}", expected=f"experts 0 to {max(experts)}, of one shape",
            found=f"experts {', '.join(map(str, sorted(experts)[:8]))}, of {len(shapes)} shape{'s' * (len(shapes) > 1)}",
            hint="copy all files of the save again",
        )  # fmt: skip
    parts = (
        Part((expert, *part.offsets), (1, *part.sizes), part.chunk)
        for expert, tensor in sorted(experts.items())
        for part in tensor.parts
    )
    return Whole((len(experts), *shapes.pop()), tuple(parts))
