"""A layout: where the components of a model's rules live in the stored tensors of a checkpoint.

A *piece* is a family of stored tensors that differ only in the axes of their names (layers): one shape, one set of
views. A stored tensor is the rule's tensor with some axes cut to a range (`ranges`: named-axis sharding) or a
contiguous window of the laid-out tensor (`window`: torch_dist chunks, tp beyond the query groups), or both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from itertools import product, repeat

from msgspec import Struct, field
from msgspec.structs import replace

from shardtool.layout.codecs import CENTRED, Codec
from shardtool.layout.equation import Tensor
from shardtool.layout.rules import Rule

# (file, tensor name, part): the part tells apart what a name alone does not: a model chunk of a per-rank file,
# or the offsets of a torch_dist chunk. The file is "" where the name alone finds the tensor.
Key = tuple[str, str, tuple[int, ...]]


class NameAxis(Struct, frozen=True):
    """An axis that is part of the name: its global `ids`; the name shows `id - shift`."""

    axis: str
    ids: tuple[int, ...]
    shift: int = 0


class Piece(Struct, frozen=True):
    """Stored tensors of one shape: tensor number `tensor` of one side of rule number `rule`.

    `part` entries are numbers, or the name of a name axis whose id stands there. `replica` pieces hold what another
    piece of the layout holds: written like it, compared with it on reading. `codec` says how the stored elements stand
    for the components' values; None: they are the values; `component_codecs` are those of single components of the rule.
    `first` is the number of its first component in the tensor of
    the equation, where it holds only some. A `constant` piece holds that number in every element and no component:
    written so in a target, checked in a source.
    """

    rule: int
    tensor: int
    dims: Tensor
    name: str
    file: str = ""
    names: tuple[NameAxis, ...] = ()
    ranges: tuple[tuple[str, int, int], ...] = ()
    window: tuple[tuple[int, int], ...] | None = None
    part: tuple[int | str, ...] = ()
    replica: bool = False
    codec: Codec | None = None
    first: int = 0
    constant: float | None = None
    component_codecs: tuple[tuple[int, Codec], ...] = ()

    def codec_of(self, component: int) -> Codec | None:
        """How it stores one component of its rule, by number."""
        return dict(self.component_codecs).get(component, self.codec)

    @property
    def instances(self) -> int:
        """The number of stored tensors."""
        count = 1
        for axis in self.names:
            count *= len(axis.ids)
        return count

    def ids(self) -> Iterator[tuple[int, ...]]:
        """The ids of the name axes, one tuple per stored tensor."""
        return product(*(axis.ids for axis in self.names))

    def key(self, ids: tuple[int, ...]) -> Key:
        """The key of one stored tensor."""
        return self.keyer()(ids)

    def keyed(self) -> Iterator[tuple[tuple[int, ...], Key]]:
        """The ids of the name axes and the key of every stored tensor."""
        return zip(self.ids(), self.all_keys(), strict=True)

    def all_keys(self) -> Iterator[Key]:
        """The key of every stored tensor, in the order of `ids`."""
        template, shown = _template(self.name)
        axes = tuple(axis.axis for axis in self.names)
        named = tuple(entry for entry in self.part if isinstance(entry, str))
        if shown not in ((), axes) or named not in ((), axes):  # some axes only, or in another order
            return map(self.keyer(), self.ids())
        # large models have a hundred thousand keys: they are made without a step of Python for each
        names: Iterator[str]
        parts: Iterator[tuple[int, ...]]
        if not shown:
            names = repeat(template % (), self.instances)
        else:
            names = map(template.__mod__, product(*([i - axis.shift for i in axis.ids] for axis in self.names)))
        if named:
            held = {axis.axis: axis.ids for axis in self.names}
            parts = product(*(held[entry] if isinstance(entry, str) else (entry,) for entry in self.part))
        else:
            parts = repeat(tuple([entry for entry in self.part if isinstance(entry, int)]))
        return zip(repeat(self.file), names, parts)

    def keyer(self) -> Callable[[tuple[int, ...]], Key]:
        """A function from the ids of the name axes to the key, for keys in any order."""
        file, axes = self.file, [axis.axis for axis in self.names]
        name, letters = _template(self.name)
        shifted = [(place, self.names[place].shift) for place in map(axes.index, letters)]
        # a place in the ids, or nothing and the number that always stands there
        part = [(axes.index(entry), 0) if isinstance(entry, str) else (None, entry) for entry in self.part]
        fixed = tuple([number for _, number in part])
        if any(place is not None for place, _ in part):

            def key(ids: tuple[int, ...]) -> Key:
                text = name % tuple([ids[place] - shift for place, shift in shifted])
                return file, text, tuple([number if place is None else ids[place] for place, number in part])

        else:

            def key(ids: tuple[int, ...]) -> Key:
                return file, name % tuple([ids[place] - shift for place, shift in shifted]), fixed

        return key


@lru_cache(maxsize=4096)
def _template(name: str) -> tuple[str, tuple[str, ...]]:
    """A piece's name as a template for numbers, and the axes that these are of."""
    return re.sub(r"\{\w+\}", "%d", name.replace("%", "%%")), tuple(re.findall(r"\{(\w+)\}", name))


class Layout(Struct, frozen=True, dict=True):
    """One side of a plan.

    `sizes` are the logical sizes of the axes, `allocated` the stored ones where they are larger (padded vocabulary).
    `side` 0 is the left side of the equations (Hugging Face), 1 the right (Megatron).
    """

    rules: tuple[Rule, ...]
    side: int
    sizes: Mapping[str, int]
    pieces: tuple[Piece, ...]
    allocated: Mapping[str, int] = field(default_factory=dict)
    description: str = ""

    def stored_sizes(self, piece: Piece) -> Mapping[str, int]:
        """The size of each axis as a piece lays it out."""
        if not piece.ranges:
            return self._whole_sizes
        return {**self._whole_sizes, **{name: high - low for name, low, high in piece.ranges}}

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """The shape of the piece's stored tensors."""
        if piece.window is not None:
            return tuple([high - low for low, high in piece.window])
        cut = (piece.dims, piece.ranges)
        if cut not in self._shapes:
            self._shapes[cut] = piece.dims.shape(self.stored_sizes(piece))
        return self._shapes[cut]

    @cached_property
    def _whole_sizes(self) -> dict[str, int]:
        return {**self.sizes, **self.allocated}

    @cached_property
    def _shapes(self) -> dict[tuple[Tensor, tuple[tuple[str, int, int], ...]], tuple[int, ...]]:
        """The shapes that have been asked for: thousands of pieces differ in their files alone."""
        return {}

    def tensors(self) -> Iterator[tuple[Key, Piece]]:
        """Every stored tensor of the layout with its piece."""
        for piece in self.pieces:
            for key in piece.all_keys():
                yield key, piece


def centred(layout: Layout) -> Layout:
    """The same layout with norms stored as gamma - 1 (Megatron-LM's --apply-layernorm-1p)."""
    pieces = (
        replace(piece, codec=CENTRED) if layout.rules[piece.rule].gamma and piece.codec is None else piece
        for piece in layout.pieces
    )
    return replace(layout, pieces=tuple(pieces))
