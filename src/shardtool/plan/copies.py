"""What a plan is: strided copies between the pieces of two layouts, padding, and rows that are cut off. Pure data."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from msgspec import Struct

from shardtool.layout.codecs import Codec, describe
from shardtool.layout.layout import Key, Layout, Piece

Range = tuple[int, int]

_JSON = json.JSONEncoder(sort_keys=True)
_HERE = "\0"  # in the place of what is written later; no name has it


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
        by_rule = self._by_rule()
        return self._said([[_entry(copy) for copy in by_rule[number]] for number in range(len(self.dst.rules))])

    def digest(self) -> str:
        """A hash of everything that the plan says."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Of the text of `as_dict`, keys sorted. It is longer than all else that a plan is, so it is never there whole."""
        by_rule, found = self._by_rule(), hashlib.sha256()
        around = _JSON.encode(self._said([_HERE] * len(self.dst.rules))).split(_JSON.encode(_HERE))
        for number, text in enumerate(around[:-1]):
            found.update(f"{text}[{', '.join(_texts(by_rule[number]))}]".encode())
        found.update(around[-1].encode())
        return found.hexdigest()

    def _by_rule(self) -> dict[int, list[Copy]]:
        found: dict[int, list[Copy]] = defaultdict(list)
        for copy in self.copies:
            found[copy.dst.rule].append(copy)
        return found

    def _said(self, copies: Sequence[object]) -> dict[str, Any]:
        """The plan as plain data, with these as the copies of its rules."""
        return {
            "from": self.src.description,
            "to": self.dst.description,
            "sizes": dict(self.dst.sizes),
            "rules": [
                {"hf": list(rule.hf), "equation": rule.equation.text, "megatron": rule.megatron, "copies": entries}
                for rule, entries in zip(self.dst.rules, copies, strict=True)
            ],
            "pad": self.pad,
            "fills": [_region(region) for region in self.fills],
            "cuts": [_region(region) for region in self.cuts],
            **_constants(self),
        }


def _entry(copy: Copy) -> dict[str, Any]:
    """A copy as plain data."""
    return {
        "component": copy.component,
        "from": [copy.src.file, copy.src.name, list(copy.src.part)],
        "to": [copy.dst.file, copy.dst.name, list(copy.dst.part)],
        "shape": list(copy.shape),
        "axes": list(copy.axes),
        "from_offset": copy.src_offset,
        "from_strides": list(copy.src_strides),
        "to_offset": copy.dst_offset,
        "to_strides": list(copy.dst_strides),
        "loops": [[loop.axis, list(loop.ids), loop.src_stride, loop.dst_stride] for loop in copy.loops],
        "replica": copy.dst.replica,
        **_codecs(copy),
    }


def _texts(copies: Iterable[Copy]) -> Iterator[str]:
    """The copies of one rule as JSON. Most are replicas that differ in the target's file alone."""
    made: dict[Hashable, tuple[str, str]] = {}
    for copy in copies:
        dst = copy.dst
        alike = (
            copy.component, id(copy.src), dst.name, dst.part, dst.replica, id(dst.codec), id(dst.component_codecs),
            copy.axes, copy.shape, copy.src_offset, copy.src_strides, copy.dst_offset, copy.dst_strides, id(copy.loops),
        )  # fmt: skip
        if alike not in made:
            entry = _entry(copy)
            entry["to"][0] = _HERE
            before, after = _JSON.encode(entry).split(_JSON.encode(_HERE))
            made[alike] = before, after
        before, after = made[alike]
        yield f"{before}{_JSON.encode(dst.file)}{after}"


def _region(region: Region) -> dict[str, Any]:
    """A region as plain data."""
    return {
        "name": region.piece.name, "file": region.piece.file, "shape": list(region.shape), "offset": region.offset,
    }  # fmt: skip


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
