"""The layout of an existing torch_dist checkpoint, from the chunks that its metadata lists (any tiling)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from shardtool.layout.equation import Tensor
from shardtool.layout.layout import Layout, NameAxis, Piece
from shardtool.layout.megatron import stacked
from shardtool.layout.rules import LAYER, Rule

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def per_layer_keys(names: Iterable[str]) -> bool:
    """Whether the checkpoint keeps a key per layer instead of a leading dim of layers."""
    return any(re.match(r"decoder\.layers\.\d+\.", name) for name in names)


def chunked_layout(
    rules: tuple[Rule, ...],
    sizes: Mapping[str, int],
    padded: int,
    tensors: Mapping[str, Iterable[Box]],
) -> Layout:
    """Where components live in the chunks of `tensors` (name -> boxes of the global tensor).

    A rule whose tensor is absent gets a piece for the whole tensor, so that the accounting names it.
    """
    by_layer = per_layer_keys(tensors)
    stored = {**sizes, "v": padded}
    pieces: list[Piece] = []
    for number, rule in enumerate(rules):
        if not rule.per_layer:
            pieces += _whole(number, rule, rule.megatron, tensors, stored)
        elif by_layer:
            for layer in range(sizes[LAYER]):
                names = (NameAxis(LAYER, (layer,)),)
                name = rule.megatron.replace("{l}", str(layer))
                pieces += _whole(number, rule, name, tensors, stored, names)
        else:
            pieces += _stacked(number, rule, stacked(rule.megatron), tensors, stored)
    kind = "per-layer keys" if by_layer else "stacked layers"
    return Layout(rules, 1, sizes, tuple(pieces), {"v": padded}, f"Megatron torch_dist, {kind}")


def _whole(
    number: int,
    rule: Rule,
    name: str,
    tensors: Mapping[str, Iterable[Box]],
    sizes: Mapping[str, int],
    names: tuple[NameAxis, ...] = (),
) -> Iterable[Piece]:
    boxes = tensors.get(name) or [((0,) * len(rule.target.dims), rule.target.shape(sizes))]
    for offsets, extents in boxes:
        window = tuple((low, low + size) for low, size in zip(offsets, extents, strict=True))
        yield Piece(number, 0, rule.target, name, names=names, window=window, part=tuple(offsets))


def _stacked(
    number: int, rule: Rule, name: str, tensors: Mapping[str, Iterable[Box]], sizes: Mapping[str, int]
) -> Iterable[Piece]:
    """Chunks of one layer each become pieces with the layer as a name axis; others keep the layers as a dim."""
    shape = rule.target.shape(sizes)
    single: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for offsets, extents in tensors.get(name) or [
        ((layer, *(0 for _ in shape)), (1, *shape)) for layer in range(sizes[LAYER])
    ]:
        window = tuple((low, low + size) for low, size in zip(offsets, extents, strict=True))
        if extents[0] == 1:
            single[window[1:]].append(offsets[0])
        else:
            dims = Tensor(((LAYER,), *rule.target.dims))
            yield Piece(number, 0, dims, name, window=window, part=tuple(offsets))
    for window, layers in single.items():
        part: tuple[int | str, ...] = (LAYER, *(low for low, _ in window))
        names = (NameAxis(LAYER, tuple(sorted(layers))),)
        yield Piece(number, 0, rule.target, name, names=names, window=window, part=part)
