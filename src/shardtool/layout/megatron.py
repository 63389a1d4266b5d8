"""The layouts of Megatron checkpoints: per-rank files (`torch`) and global tensors in chunks (`torch_dist`).

Key names and split rules: megatron-core 0.16.1 models/gpt/gpt_layer_specs.py, tensor_parallel/layers.py,
transformer/attention.py, transformer/mlp.py `apply_swiglu_sharded_factory`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import lcm

from msgspec import Struct
from msgspec.structs import replace

from shardtool.errors import UsageError
from shardtool.layout.equation import Product, Sum, Tensor, product_size
from shardtool.layout.layout import Layout, NameAxis, Piece
from shardtool.layout.mesh import Chunk, Mesh
from shardtool.layout.rules import EXPERT, LAYER, MTP, Rule

LAYER_PREFIX = "decoder.layers.{l}."
STACKED_PREFIX = "decoder.layers."
EXPERTS = "mlp.experts."
EMBEDDING = "embedding.word_embeddings.weight"
MTP_INNER = ".transformer_layer."  # how rules spell the layer inside a multi-token-prediction layer

# Transformer Engine fuses a norm into the linear after it; the local spec keeps it as a module of its own.
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "self_attention.in_proj.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


class Spelling(Struct, frozen=True):
    """How per-rank files name what the rules name.

    `spec` is `te` or `local`; `experts` is `grouped` (`linear_fc1.weight3`), `sequential` (`local_experts.3.`), or, in
    files that are only read, `single` (one tensor of all local experts, 0.19) and `transposed` (`weight1`, `weight2`, to
    0.16); `mtp` is the name of the layer inside an MTP layer (`transformer_layer` to 0.16, `mtp_model_layer` from 0.17).
    `cut_down_projections`: whether tp cuts latent attention's down projections, which the local spec does and
    Transformer Engine's has done to 0.13 (None: as the spec does now).
    """

    spec: str = "te"
    experts: str = "grouped"
    mtp: str = "mtp_model_layer"
    cut_down_projections: bool | None = None

    @property
    def local_cuts(self) -> bool:
        """Whether tp shards the axes that rules name for the local spec."""
        return self.spec == "local" if self.cut_down_projections is None else self.cut_down_projections

    def key(self, key: str) -> str:
        """A rule's Megatron key in per-rank files."""
        if self.spec == "local":
            for fused, alone in LOCAL_NAMES.items():
                key = key.replace(fused, alone)
        if "{e}" in key:
            if self.experts == "sequential":
                key = re.sub(r"experts\.(\w+)\.(\w+)\{e\}", r"experts.local_experts.{e}.\1.\2", key)
            elif self.experts == "single":
                key = key.replace("{e}", "")
            elif self.experts == "transposed":
                key = key.replace("linear_fc1.weight{e}", "weight1").replace("linear_fc2.weight{e}", "weight2")
        return key.replace(MTP_INNER, f".{self.mtp}.")


def on_first(key: str) -> bool:
    """Whether the tensor of a key outside the layers is on the chunk with the embedding; otherwise the last."""
    return key.startswith("embedding.")


def rank_grid(mesh: Mesh) -> dict[tuple[int, int], int]:
    """The expert tensor parallel rank of each (tp, ep) rank that exists in a pipeline stage.

    Ranks count tp fastest in the dense grid, etp then ep in the expert grid (megatron-core 0.16.1 parallel_state.py,
    order tp-cp-ep-dp-pp). With etp = tp that is every combination. Raises UsageError where two expert shards would
    share a (tp, ep) rank, which per-rank file names cannot tell apart.
    """
    if mesh.expert_tp == mesh.tp:
        return {(tp, ep): tp for ep in range(mesh.ep) for tp in range(mesh.tp)}
    grid: dict[tuple[int, int], int] = {}
    for rank in range(lcm(mesh.tp, mesh.expert_tp * mesh.ep)):
        place, etp = (rank % mesh.tp, rank // mesh.expert_tp % mesh.ep), rank % mesh.expert_tp
        if grid.setdefault(place, etp) != etp:
            raise UsageError(
                f"per-rank files cannot hold etp {mesh.expert_tp} with tp {mesh.tp} and ep {mesh.ep}",
                expected="one expert shard per (tp, ep) rank, which is all that a file name tells",
                found=f"expert shards {grid[place]} and {etp} on tp {place[0]}, ep {place[1]}",
                hint="use --format torch_dist",
            )
    return grid


def held_ranks(mesh: Mesh, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """The expert tensor parallel rank of each (tp, ep) rank of `places`, which may be fewer or more than `rank_grid`'s.

    Writers leave ranks out: to 0.18 all but the first expert data parallel group's, from 0.19 all but those of the first
    dense or expert data parallel group (training/checkpointing.py save_checkpoint); others write every combination.
    Where etp divides tp a rank's number decides. Raises UsageError for a rank that no such run has.
    """
    divides = mesh.tp % mesh.expert_tp == 0
    grid = {} if divides else rank_grid(mesh)
    found = {}
    for tp, ep in places:
        if not divides and (tp, ep) not in grid:
            raise UsageError(
                f"no rank is tp {tp} and ep {ep}",
                expected=f"ranks of tp {mesh.tp}, ep {mesh.ep}, etp {mesh.expert_tp}",
                hint="give sizes of which one is a multiple of the other",
            )
        found[tp, ep] = tp % mesh.expert_tp if divides else grid[tp, ep]
    return found


def expert_block(sizes: Mapping[str, int], mesh: Mesh, ep: int) -> tuple[int, ...]:
    """The global ids of an expert parallel rank's experts: contiguous blocks; UsageError where they do not divide."""
    count = sizes[EXPERT]
    if count % mesh.ep:
        raise UsageError(f"ep {mesh.ep} does not divide {count} experts", hint="choose another --ep")
    each = count // mesh.ep
    return tuple(range(ep * each, (ep + 1) * each))


def tp_cuts(
    rule: Rule, tp: int, sizes: Mapping[str, int], *, local: bool = False
) -> list[tuple[tuple[str, int, int] | None, int | None]]:
    """What each tp rank holds: (range of the sharded axis, None), or (None, the dim that is cut into equal windows).

    `local`: shard the axes that rules name for the local spec. Raises UsageError when neither is possible. More tp
    ranks than query groups means plain contiguous rows (megatron-core 0.16 and newer; transformer_config.py: the one
    must divide the other).
    """
    axis = (rule.tp_local or rule.tp) if local else rule.tp
    if axis is None or tp == 1:
        return [(None, None)] * tp
    size = sizes[axis]
    if size % tp == 0:
        step = size // tp
        return [((axis, rank * step, (rank + 1) * step), None) for rank in range(tp)]
    dim = next(index for index, dim in enumerate(rule.target.dims) if axis in _axes(dim))
    if axis == "g" and tp % size == 0 and product_size(rule.target.dims[dim], sizes) % tp == 0:
        if sizes["q"] * size % tp == 0:
            return [(None, dim)] * tp
        raise UsageError(
            f"tp {tp} does not divide {sizes['q'] * size} attention heads",
            where=rule.megatron,
            hint="choose a --tp that divides the number of attention heads",
        )
    names = {
        "g": "query groups",
        "f": "rows of the MLP",
        "x": "rows of each expert",
        "s": "rows of the shared expert",
        "n": "attention heads",
        "t": "key heads of linear attention",
        "v": "rows of the padded vocabulary",
        "y": "rows of the query down projection",
        "j": "rows of the key-value down projection",
        "o": "rows of the MTP projection",
    }
    raise UsageError(
        f"tp {tp} does not divide {size} {names.get(axis, 'of axis ' + axis)}",
        where=rule.megatron,
        expected=f"a tp that divides {size}" + (f", or a multiple of {size}" if axis == "g" else ""),
        found=f"tp {tp}",
        hint="choose another --tp",
    )


def _axes(product: Product) -> set[str]:
    found: set[str] = set()
    for factor in product:
        found |= {factor} if isinstance(factor, str) else set().union(*(_axes(term) for term in factor.terms))
    return found


class _Legacy(Struct, frozen=True):
    """What places pieces in per-rank files."""

    sizes: dict[str, int]
    allocated: dict[str, int]
    mesh: Mesh
    spelling: Spelling
    files: Mapping[tuple[int, int, int], str]
    grid: Mapping[tuple[int, int], int]

    def ranks(self, chunk: Chunk) -> Iterator[tuple[tuple[int, int], int, str]]:
        """The (tp, ep) ranks of a chunk's stage that have a file: ((tp, ep), etp, file)."""
        for (tp, ep), etp in self.grid.items():
            if file := self.files.get((tp, chunk.pp, ep)):
                yield (tp, ep), etp, file

    def dense(self, number: int, rule: Rule, chunk: Chunk, name: str, names: tuple[NameAxis, ...]) -> Iterator[Piece]:
        """The pieces of a tensor that every expert parallel rank has, tp ranks of it or replicas."""
        sizes, target, part = self.sizes | self.allocated, rule.target, (chunk.vpp,)
        cuts = tp_cuts(rule, self.mesh.tp, sizes, local=self.spelling.local_cuts)
        held = [
            ((cut,) if cut else (), None if dim is None else _equal_window(target, sizes, dim, tp, self.mesh.tp))
            for tp, (cut, dim) in enumerate(cuts)
        ]
        placed: set[int] = set()
        for (tp, _), _, file in self.ranks(chunk):
            ranges, window = held[tp]
            replica = tp in placed or (not ranges and window is None and bool(placed))
            placed.add(tp)
            yield Piece(number, 0, target, name, file, names, ranges, window, part, replica)

    def experts(self, number: int, rule: Rule, chunk: Chunk, name: str, names: tuple[NameAxis, ...]) -> Iterator[Piece]:
        """The pieces of an expert's tensor: expert blocks over ep, shards over etp."""
        cuts, target = tp_cuts(rule, self.mesh.expert_tp, self.sizes | self.allocated), rule.target
        placed: set[tuple[int, int]] = set()
        for (_, ep), etp, file in self.ranks(chunk):
            ids = expert_block(self.sizes, self.mesh, ep)
            cut = cuts[etp][0]
            shard = (ep, etp if cut else 0)  # what is not cut is on every expert tensor parallel rank
            replica = shard in placed
            placed.add(shard)
            ranges = (cut,) if cut else ()
            dims, axes = target, names
            if "{e}" in name:
                axes = (*names, NameAxis(EXPERT, ids, ids[0]))
            else:  # all local experts in one tensor
                inner = reversed(target.dims) if self.spelling.experts == "transposed" else target.dims
                dims = Tensor(((EXPERT,), *inner))
                ranges = ((EXPERT, ids[0], ids[-1] + 1), *ranges)
            yield Piece(number, 0, dims, name, file, axes, ranges, None, (chunk.vpp,), replica)


def legacy_layout(
    rules: tuple[Rule, ...],
    sizes: Mapping[str, int],
    padded: int,
    model_chunks: Sequence[Chunk],
    mesh: Mesh,
    spelling: Spelling,
    files: Mapping[tuple[int, int, int], str],
) -> Layout:
    """Where components live in per-rank files; `files` gives the file of each (tp rank, pipeline stage, ep rank) there is.

    A key's part is the model chunk (virtual stage) inside the file. Raises UsageError where a size does not divide.
    """
    experts = any(rule.per_expert for rule in rules)
    places = sorted({(tp, ep) for tp, _, ep in files}, key=lambda place: (place[1], place[0]))
    grid = held_ranks(mesh, places) if experts else {(tp, ep): tp for tp, ep in places}
    placing = _Legacy(dict(sizes), {"v": padded}, mesh, spelling, files, grid)
    first, last = model_chunks[0], model_chunks[-1]
    mtp = next((chunk for chunk in model_chunks if chunk.mtp), last)
    pieces: list[Piece] = []
    for number, rule in enumerate(rules):
        if rule.constant:
            continue
        name = spelling.key(rule.megatron)
        place = placing.experts if rule.per_expert else placing.dense
        if rule.per_mtp:
            pieces += place(number, rule, mtp, name, (NameAxis(MTP, tuple(range(sizes[MTP]))),))
        elif rule.per_layer:
            for chunk in model_chunks:
                held = tuple(layer for layer in chunk.layers if layer in set(rule.ids(sizes[LAYER])))
                if held:
                    pieces += place(number, rule, chunk, name, (NameAxis(LAYER, held, chunk.layers[0]),))
        else:
            pieces += place(number, rule, first if on_first(name) else last, name, ())
            for key, codec in rule.derived:
                made = place(number, rule, first if on_first(key) else last, key, ())
                pieces += [replace(piece, replica=True, codec=codec) for piece in made]
            copies = [(last, rule.tied_copy)] if rule.tied_copy and mesh.pp > 1 else []
            if rule.megatron == EMBEDDING and sizes.get(MTP) and mtp.pp > 0:
                copies.append((mtp, EMBEDDING))  # multi-token prediction embeds its tokens where it runs
            for chunk, copy in copies:
                pieces += [replace(piece, replica=True) for piece in place(number, rule, chunk, copy, ())]
    what = f"Megatron torch, tp {mesh.tp} pp {mesh.pp}" + (f" ep {mesh.ep} etp {mesh.expert_tp}" if experts else "")
    return Layout(rules, 1, sizes, tuple(pieces), {"v": padded}, what)


def _equal_window(
    tensor: Tensor, sizes: Mapping[str, int], dim: int, rank: int, count: int
) -> tuple[tuple[int, int], ...]:
    shape = tensor.shape(sizes)
    step = shape[dim] // count
    return tuple((rank * step, (rank + 1) * step) if at == dim else (0, size) for at, size in enumerate(shape))


def dist_layout(
    rules: tuple[Rule, ...],
    sizes: Mapping[str, int],
    padded: int,
    model_chunks: Sequence[Chunk],
    mesh: Mesh,
    *,
    stacked: bool = True,
) -> Layout:
    """Where components live in a torch_dist checkpoint that ranks of this mesh would write.

    One chunk per layer, expert and tp shard, in the file of its rank, `__{rank}_0.distcp`. With `stacked` layers are a
    leading dim (megatron-core's homogeneous layout), else each layer has its own key; experts are always stacked.
    """
    stored = {**sizes, "v": padded}
    first, last = model_chunks[0], model_chunks[-1]
    mtp = next((chunk for chunk in model_chunks if chunk.mtp), last)
    pieces: list[Piece] = []
    for number, rule in enumerate(rules):
        if rule.constant:
            continue
        if rule.per_mtp:
            homes: list[tuple[Chunk, tuple[NameAxis, ...]]] = [(mtp, (NameAxis(MTP, tuple(range(sizes[MTP]))),))]
        elif rule.per_layer:
            held = set(rule.ids(sizes[LAYER]))
            in_chunks = [(chunk, tuple(layer for layer in chunk.layers if layer in held)) for chunk in model_chunks]
            homes = [(chunk, (NameAxis(LAYER, ids),)) for chunk, ids in in_chunks if ids]
        else:
            homes = [(first if on_first(rule.megatron) else last, ())]
        for chunk, names in homes:
            pieces += _dist_pieces(
                number, rule, (rule.megatron, *rule.dist_aliases), chunk, names, mesh, stored, stacked
            )
        for key, codec in rule.derived:
            held_by = first if on_first(key) else last
            made = _dist_pieces(number, rule, (key,), held_by, (), mesh, stored, stacked)
            pieces += [replace(piece, replica=True, codec=codec) for piece in made]
    return Layout(rules, 1, sizes, tuple(pieces), {"v": padded}, f"Megatron torch_dist, tp {mesh.tp} pp {mesh.pp}")


def _dist_pieces(
    number: int,
    rule: Rule,
    keys: tuple[str, ...],
    chunk: Chunk,
    names: tuple[NameAxis, ...],
    mesh: Mesh,
    stored: dict[str, int],
    stacked: bool,
) -> Iterator[Piece]:
    """The chunks of one rule's tensors in one model chunk, under the first of the keys and again under the others."""
    blocks = range(mesh.ep) if rule.per_expert else range(1)
    width = mesh.expert_tp if rule.per_expert else mesh.tp
    in_stack: tuple[str, ...] = (LAYER,) if rule.per_layer and stacked else ()
    for ep in blocks:
        axes, leading = names, in_stack
        if rule.per_expert:
            axes = (*names, NameAxis(EXPERT, expert_block(stored, mesh, ep)))
            leading = (*in_stack, EXPERT)
        for rank, (cut, dim) in enumerate(tp_cuts(rule, width, stored)):
            if cut is None and dim is None and rank > 0:
                continue
            # any rank that holds it may write it: the first of the stage with these expert and tp ranks
            file = f"__{chunk.pp * mesh.tp * mesh.ep + ep * mesh.tp + rank % mesh.tp}_0.distcp"
            for held in rule.parts:
                tensor = held.tensor
                if dim is not None:
                    windows = [_equal_window(tensor, stored, dim, rank, width)]
                else:
                    windows = _whole_windows(tensor.shape(stored), _windows(tensor, cut, stored) if cut else [])
                for window in windows:
                    part: tuple[int | str, ...] = (*leading, *(low for low, _ in window))
                    for key in keys:
                        name = dist_name(key, stacked=stacked) + held.ending
                        replica = key != keys[0]
                        yield Piece(number, 0, tensor, name, file, axes, (), window, part, replica, first=held.first)


def dist_name(key: str, *, stacked: bool) -> str:
    """A rule's key in torch_dist: experts doubled and without their number, layers without theirs where stacked."""
    key = key.replace(EXPERTS, "mlp.experts.experts.").replace("{e}", "") if "{e}" in key else key
    return key.replace(LAYER_PREFIX, STACKED_PREFIX) if stacked else key


def _whole_windows(shape: tuple[int, ...], cuts: Iterable[tuple[int, int, int]]) -> list[tuple[tuple[int, int], ...]]:
    whole = tuple((0, size) for size in shape)
    return [tuple((low, high) if at == dim else pair for at, pair in enumerate(whole)) for dim, low, high in cuts] or [
        whole
    ]


def _windows(tensor: Tensor, cut: tuple[str, int, int], sizes: Mapping[str, int]) -> Iterable[tuple[int, int, int]]:
    """The contiguous (dim, low, high) of the whole tensor that a range of one axis covers: one per term of a sum.

    The axis must be outermost in its dim or term (as every axis that megatron-core shards is); ValueError otherwise.
    """
    axis, low, high = cut
    for dim, factors in enumerate(tensor.dims):
        if axis not in _axes(factors):
            continue
        terms: Sequence[Product] = [factors]
        if len(factors) == 1 and isinstance(factors[0], Sum):
            terms = factors[0].terms
        sizes_of = [product_size(term, sizes) for term in terms]
        for start, term in zip(accumulate(sizes_of, initial=0), terms, strict=False):
            if term[0] != axis:
                raise ValueError(f"axis {axis} is not outermost in {term}")
            stride = product_size(term[1:], sizes)
            yield dim, start + low * stride, start + high * stride
