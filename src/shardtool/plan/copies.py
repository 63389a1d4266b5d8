"""What a plan is: strided copies between the pieces of two layouts, padding, and rows that are cut off. Pure data."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from msgspec import Struct

from shardtool.layout.codecs import Codec, describe
from shardtool.layout.layout import Key, Layout, Piece

Range = tuple[int, int]


class Loop(Struct, frozen=True):
    """An axis that is in the name on one side or both: the ids to go through, and what each adds to the addresses."""

    axis: str
    ids: tuple[int, ...]
    src_stride: int
    dst_stride: int


class Copy(Struct, frozen=True):
    """A strided copy of `shape` elements, once for every combination of the loops' ids. All numbers count elements.

    A source stride of 0 repeats an element (padding rows that repeat the last).
    """

    component: int
    src: Piece
    dst: Piece
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]
    loops: tuple[Loop, ...] = ()

    @property
    def volume(self) -> int:
        """Elements of one instance."""
        return prod(self.shape)

    @property
    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """How source and target store the component."""
        return self.src.codec_of(self.component), self.dst.codec_of(self.component)

    @property
    def changed(self) -> bool:
        """Whether values are computed: the two store them in different ways."""
        src, dst = self.codecs
        return src != dst

    def instances(self) -> Iterator[tuple[tuple[int, ...], Key, int, Key, int]]:
        """(ids of the target's name axes, source key, source offset, target key, target offset) of every instance."""
        order = [loop.axis for loop in self.loops]
        src_at = [order.index(axis.axis) for axis in self.src.names]
        dst_at = [order.index(axis.axis) for axis in self.dst.names]
        src_key, dst_key = self.src.keyer(), self.dst.keyer()
        for ids in product(*(loop.ids for loop in self.loops)):
            src = self.src_offset + sum(i * loop.src_stride for i, loop in zip(ids, self.loops, strict=True))
            dst = self.dst_offset + sum(i * loop.dst_stride for i, loop in zip(ids, self.loops, strict=True))
            dst_ids = tuple(ids[at] for at in dst_at)
            yield dst_ids, src_key(tuple(ids[at] for at in src_at)), src, dst_key(dst_ids), dst


class Region(Struct, frozen=True):
    """A strided part of a stored tensor that has no counterpart: padding to fill (target) or to cut (source)."""

    component: int
    piece: Piece
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def volume(self) -> int:
        """Elements."""
        return prod(self.shape)


class Plan(Struct, frozen=True, dict=True):
    """What goes where. `fills` are target regions that take the padding value, `cuts` source regions left out."""

    src: Layout
    dst: Layout
    copies: tuple[Copy, ...]
    fills: tuple[Region, ...]
    cuts: tuple[Region, ...]
    pad: str = "zeros"

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data (JSON), per rule, layers folded."""
        rules = []
        by_rule: dict[int, list[Copy]] = defaultdict(list)
        for copy in self.copies:
            by_rule[copy.dst.rule].append(copy)
        for number, rule in enumerate(self.dst.rules):
            entries = [
                {
                    "component": c.component,
                    "from": [c.src.file, c.src.name, list(c.src.part)],
                    "to": [c.dst.file, c.dst.name, list(c.dst.part)],
                    "shape": list(c.shape),
                    "axes": list(c.axes),
                    "from_offset": c.src_offset,
                    "from_strides": list(c.src_strides),
                    "to_offset": c.dst_offset,
                    "to_strides": list(c.dst_strides),
                    "loops": [[loop.axis, list(loop.ids), loop.src_stride, loop.dst_stride] for loop in c.loops],
                    "replica": c.dst.replica,
                    **_codecs(c),
                }
                for c in by_rule[number]
            ]
            rules.append(
                {"hf": list(rule.hf), "equation": rule.equation.text, "megatron": rule.megatron, "copies": entries}
            )
        region = [
            {"name": r.piece.name, "file": r.piece.file, "shape": list(r.shape), "offset": r.offset} for r in self.fills
        ]
        cut = [
            {"name": r.piece.name, "file": r.piece.file, "shape": list(r.shape), "offset": r.offset} for r in self.cuts
        ]
        return {
            "from": self.src.description,
            "to": self.dst.description,
            "sizes": dict(self.dst.sizes),
            "rules": rules,
            "pad": self.pad,
            "fills": region,
            "cuts": cut,
            **_constants(self),
        }

    def digest(self) -> str:
        """A hash of everything that the plan says."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


def _constants(plan: Plan) -> dict[str, Any]:
    """The tensors that hold one number, on either side, where there are some."""
    sides = {"from": plan.src, "to": plan.dst}
    found = {
        name: [[p.name, list(layout.shape(p)), p.constant] for p in layout.pieces if p.constant is not None]
        for name, layout in sides.items()
    }
    return {"constants": found} if any(found.values()) else {}


def _codecs(copy: Copy) -> dict[str, str]:
    """How a copy changes values, where it does."""
    if not copy.changed:
        return {}
    return dict(zip(("from_codec", "to_codec"), map(describe, copy.codecs), strict=True))
