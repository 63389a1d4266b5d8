"""The layout of an existing torch_dist checkpoint, from the chunks that its metadata lists (any tiling)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from msgspec.structs import replace

from shardtool.layout.equation import Tensor
from shardtool.layout.layout import Layout, NameAxis, Piece
from shardtool.layout.megatron import dist_name
from shardtool.layout.rules import EXPERT, LAYER, MTP, Part, Rule

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
Window = tuple[tuple[int, int], ...]


def per_layer_keys(names: Iterable[str]) -> bool:
    """Whether the checkpoint keeps a key per layer instead of a leading dim of layers."""
    return any(re.match(r"decoder\.layers\.\d+\.", name) for name in names)


def chunked_layout(
    rules: tuple[Rule, ...], sizes: Mapping[str, int], padded: int, tensors: Mapping[str, Iterable[Box]]
) -> Layout:
    """Where components live in the chunks of `tensors` (name -> boxes of the global tensor).

    A tensor that is there under several of its keys is a replica under all but the first. One that is absent gets
    pieces for the whole tensor, so that the accounting names it.
    """
    stacked = not per_layer_keys(tensors)
    stored = {**sizes, "v": padded}
    pieces: list[Piece] = []
    for number, rule in enumerate(rules):
        if rule.constant:
            continue
        for instance in _instances(rule, stored, stacked):
            keys = [_name(key, instance, stacked) for key in (rule.megatron, *rule.dist_aliases)]
            for part in rule.parts:
                names = [key + part.ending for key in keys]
                present = [name for name in names if name in tensors] or names[:1]
                for name in present:
                    pieces += _tensor(number, rule, part, name, instance, tensors.get(name), stored, name != present[0])
            for name, codec in rule.derived:
                made = _tensor(number, rule, rule.parts[0], name, instance, tensors.get(name), stored, True)
                pieces += [replace(piece, codec=codec) for piece in made]
    kind = "stacked layers" if stacked else "per-layer keys"
    return Layout(rules, 1, sizes, tuple(pieces), {"v": padded}, f"Megatron torch_dist, {kind}")


def _instances(rule: Rule, sizes: Mapping[str, int], stacked: bool) -> Iterator[tuple[NameAxis, ...]]:
    """The name axes of each global tensor of a rule: none, one layer, or one MTP layer."""
    if rule.per_mtp:
        yield from ((NameAxis(MTP, (layer,)),) for layer in range(sizes[MTP]))
    elif rule.per_layer and not stacked:
        yield from ((NameAxis(LAYER, (layer,)),) for layer in rule.ids(sizes[LAYER]))
    else:
        yield ()


def _name(key: str, instance: tuple[NameAxis, ...], stacked: bool) -> str:
    name = dist_name(key, stacked=stacked)
    return name.format(**{axis.axis: axis.ids[0] for axis in instance})


def _tensor(
    number: int,
    rule: Rule,
    part: Part,
    name: str,
    instance: tuple[NameAxis, ...],
    boxes: Iterable[Box] | None,
    sizes: Mapping[str, int],
    replica: bool,
) -> Iterator[Piece]:
    """The pieces of one global tensor: its leading dims are layers (stacked) and experts.

    Chunks of one layer and one expert each become pieces with these as name axes; others keep them as dims.
    """
    leading: tuple[str, ...] = (LAYER,) if rule.per_layer and not instance else ()
    leading += (EXPERT,) if rule.per_expert else ()
    shape = part.tensor.shape(sizes)
    if boxes is None:
        heads = product(*(rule.ids(sizes[LAYER]) if axis == LAYER else range(sizes[EXPERT]) for axis in leading))
        boxes = [((*head, *(0 for _ in shape)), (*(1 for _ in head), *shape)) for head in heads]
    single: dict[Window, list[tuple[int, ...]]] = defaultdict(list)
    count = len(leading)
    for offsets, extents in boxes:
        window = tuple((low, low + size) for low, size in zip(offsets, extents, strict=True))
        if all(size == 1 for size in extents[:count]):
            single[window[count:]].append(offsets[:count])
        else:
            dims = Tensor((*((axis,) for axis in leading), *part.tensor.dims))
            yield Piece(number, 0, dims, name, "", instance, (), window, tuple(offsets), replica, first=part.first)
    for window, found in single.items():
        for ids in _grids(found):
            axes = tuple(NameAxis(axis, values) for axis, values in zip(leading, ids, strict=True))
            place: tuple[int | str, ...] = (*leading, *(low for low, _ in window))
            yield Piece(
                number, 0, part.tensor, name, "", (*instance, *axes), (), window, place, replica, first=part.first
            )


def _grids(heads: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Index tuples as products of index lists: all layers with the same experts together."""
    if not heads or len(heads[0]) < 2:
        yield tuple(tuple(sorted(head[at] for head in heads)) for at in range(len(heads[0])))
        return
    by_first: dict[int, list[int]] = defaultdict(list)
    for first, second in heads:
        by_first[first].append(second)
    by_seconds: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for first, seconds in by_first.items():
        by_seconds[tuple(sorted(seconds))].append(first)
    for held, firsts in by_seconds.items():
        yield tuple(sorted(firsts)), held
