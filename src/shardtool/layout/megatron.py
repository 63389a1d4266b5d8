"""The layouts of Megatron checkpoints: per-rank files (`torch`) and global tensors in chunks (`torch_dist`).

Key names and split rules: megatron-core 0.16.1 models/gpt/gpt_layer_specs.py, tensor_parallel/layers.py,
transformer/attention.py, transformer/mlp.py `apply_swiglu_sharded_factory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from shardtool.errors import UsageError
from shardtool.layout.equation import Product, Sum, Tensor, product_size
from shardtool.layout.layout import Layout, NameAxis, Piece
from shardtool.layout.mesh import Chunk, Mesh
from shardtool.layout.rules import LAYER, Rule

LAYER_PREFIX = "decoder.layers.{l}."
STACKED_PREFIX = "decoder.layers."

# Transformer Engine fuses a norm into the linear after it; the local spec keeps it as a module of its own.
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}


def spelled(key: str, spec: str) -> str:
    """A rule's Megatron key in per-rank files of the `te` or the `local` spec."""
    if spec == "local" and key.startswith(LAYER_PREFIX):
        rest = key.removeprefix(LAYER_PREFIX)
        return LAYER_PREFIX + LOCAL_NAMES.get(rest, rest)
    return key


def on_first(rule: Rule) -> bool:
    """Whether the rule's tensor is on the chunk with the embedding; otherwise the layers' or the last."""
    return rule.megatron.startswith("embedding.")


def tp_cuts(rule: Rule, tp: int, sizes: Mapping[str, int]) -> list[tuple[tuple[str, int, int] | None, int | None]]:
    """What each tp rank holds: (range of the sharded axis, None), or (None, the dim that is cut into equal windows).

    Raises UsageError when neither is possible. More tp ranks than query groups means plain contiguous rows
    (megatron-core 0.16 and newer; transformer_config.py: the one must divide the other).
    """
    if rule.tp is None or tp == 1:
        return [(None, None)] * tp
    size = sizes[rule.tp]
    if size % tp == 0:
        step = size // tp
        return [((rule.tp, rank * step, (rank + 1) * step), None) for rank in range(tp)]
    dim = next(index for index, dim in enumerate(rule.target.dims) if rule.tp in _axes(dim))
    if rule.tp == "g" and tp % size == 0 and product_size(rule.target.dims[dim], sizes) % tp == 0:
        if sizes["q"] * size % tp == 0:
            return [(None, dim)] * tp
        raise UsageError(
            f"tp {tp} does not divide {sizes['q'] * size} attention heads",
            where=rule.megatron,
            hint="choose a --tp that divides the number of attention heads",
        )
    names = {"g": "query groups", "f": "rows of the MLP", "v": "rows of the padded vocabulary"}
    raise UsageError(
        f"tp {tp} does not divide {size} {names.get(rule.tp, 'of axis ' + rule.tp)}",
        where=rule.megatron,
        expected=f"a tp that divides {size}" + (f", or a multiple of {size}" if rule.tp == "g" else ""),
        found=f"tp {tp}",
        hint="choose another --tp",
    )


def _axes(product: Product) -> set[str]:
    found: set[str] = set()
    for factor in product:
        found |= {factor} if isinstance(factor, str) else set().union(*(_axes(term) for term in factor.terms))
    return found


def legacy_layout(
    rules: tuple[Rule, ...],
    sizes: Mapping[str, int],
    padded: int,
    model_chunks: Sequence[Chunk],
    mesh: Mesh,
    spec: str,
    files: Mapping[tuple[int, int], str],
) -> Layout:
    """Where components live in per-rank files; `files` gives the file of each (tp rank, pipeline stage).

    A key's part is the model chunk (virtual stage) inside the file.
    """
    allocated = {"v": padded}
    first, last = model_chunks[0], model_chunks[-1]
    pieces: list[Piece] = []

    def place(number: int, chunk: Chunk, name: str, names: tuple[NameAxis, ...], replica: bool) -> None:
        rule = rules[number]
        stored = {**sizes, **allocated}
        for rank, (cut, dim) in enumerate(tp_cuts(rule, mesh.tp, stored)):
            window = None
            if dim is not None:
                shape = list(rule.target.shape(stored))
                step = shape[dim] // mesh.tp
                window = tuple((rank * step, (rank + 1) * step) if at == dim else (0, n) for at, n in enumerate(shape))
            pieces.append(
                Piece(
                    number, 0, rule.target, name, files[rank, chunk.pp], names,
                    (cut,) if cut else (), window, (chunk.vpp,), replica or (rule.tp is None and rank > 0),
                )
            )  # fmt: skip

    for number, rule in enumerate(rules):
        name = spelled(rule.megatron, spec)
        if rule.per_layer:
            for chunk in model_chunks:
                if chunk.layers:
                    place(number, chunk, name, (NameAxis(LAYER, chunk.layers, chunk.layers[0]),), False)
        else:
            place(number, first if on_first(rule) else last, name, (), False)
            if rule.tied_copy and mesh.pp > 1:
                place(number, last, rule.tied_copy, (), True)
    return Layout(rules, 1, sizes, tuple(pieces), allocated, f"Megatron torch, tp {mesh.tp} pp {mesh.pp}")


def dist_layout(
    rules: tuple[Rule, ...], sizes: Mapping[str, int], padded: int, model_chunks: Sequence[Chunk], mesh: Mesh
) -> Layout:
    """Where components live in a torch_dist checkpoint that ranks of this mesh would write.

    Layers are stacked in a leading dim, one chunk per layer and tp shard; a piece's file is its rank's,
    `__{rank}_0.distcp`.
    """
    allocated = {"v": padded}
    stored = {**sizes, **allocated}
    first, last = model_chunks[0], model_chunks[-1]
    pieces: list[Piece] = []
    for number, rule in enumerate(rules):
        shape = rule.target.shape(stored)
        homes = model_chunks if rule.per_layer else [first if on_first(rule) else last]
        for chunk in homes:
            if rule.per_layer and not chunk.layers:
                continue
            names = (NameAxis(LAYER, chunk.layers),) if rule.per_layer else ()
            for rank, (cut, dim) in enumerate(tp_cuts(rule, mesh.tp, stored)):
                if rule.tp is None and rank > 0:
                    continue
                file = f"__{chunk.pp * mesh.tp + rank}_0.distcp"
                if dim is not None:
                    step = shape[dim] // mesh.tp
                    cuts = [(dim, rank * step, (rank + 1) * step)]
                else:
                    cuts = list(_windows(rule.target, cut, stored)) if cut else []
                for window in _whole_windows(shape, cuts):
                    origin: tuple[int | str, ...] = tuple(low for low, _ in window)
                    part = (LAYER, *origin) if rule.per_layer else origin
                    name = stacked(rule.megatron)
                    pieces.append(Piece(number, 0, rule.target, name, file, names, (), window, part))
    return Layout(rules, 1, sizes, tuple(pieces), allocated, f"Megatron torch_dist, tp {mesh.tp} pp {mesh.pp}")


def stacked(key: str) -> str:
    """A rule's key in the homogeneous torch_dist layout, where layers are a leading dim."""
    return key.replace(LAYER_PREFIX, STACKED_PREFIX)


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
