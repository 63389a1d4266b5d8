"""What became of an axis: which index of the one side each index of the other holds, and what people call that."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

from msgspec import Struct

# what an axis counts (families.blocks has the letters): one, several
AXES = {
    "l": "layers", "e": "experts", "m": "MTP layers", "g": "query groups", "q": "query heads within their groups",
    "gq": "query heads across the groups", "d": "head dims", "f": "MLP rows", "x": "rows of each expert",
    "s": "rows of the shared expert", "v": "vocabulary rows", "p": "positions", "h": "hidden channels",
    "n": "attention heads", "k": "query dims of each head", "u": "key and value dims of each head",
    "w": "value dims of each head", "j": "key-value rank and rope dims", "y": "query rank", "z": "key-value rank",
}  # fmt: skip
ROPE = ("d", "k", "j")  # axes with rope dims, all of them or the last


class Diagnosis(Struct, frozen=True):
    """What a difference is: a code for programs, a text for people."""

    code: str
    text: str


def axis_name(axis: str) -> str:
    """What an axis counts."""
    return AXES.get(axis, f"indices of axis {axis}")


def origins(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[int | None]:
    """For each index of b the index of a with the same content, itself where that is one of them; None: nowhere."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for index, value in enumerate(a):
        places[value].append(index)
    found: list[int | None] = []
    for index, value in enumerate(b):
        held = places.get(value, [])
        found.append(index if index < len(a) and a[index] == value else held[0] if held else None)
    return found


def permutation(found: Sequence[int | None]) -> list[int] | None:
    """The origins as a permutation, None where they are none."""
    known = [index for index in found if index is not None]
    return known if sorted(known) == list(range(len(found))) else None


class _Moved(Struct, frozen=True):
    """A permutation: index i of b holds what index `order[i]` of a does; `inner` is the part of it that moved."""

    axis: str
    order: Sequence[int]
    parts: Mapping[str, int]
    low: int
    inner: Sequence[int]

    @property
    def pairs(self) -> list[tuple[int, int]] | None:
        """The exchanged indices, where it is a few exchanges of two."""
        return _pairs(self.order)


def describe(axis: str, moved: Sequence[int], parts: Mapping[str, int]) -> Diagnosis:
    """What a permutation of an axis is called. Index i of b holds what index `moved[i]` of a does.

    `parts` are sizes of blocks with a name of their own: ("tp shard", rows of one).
    """
    low, high = _span(moved)
    one = _Moved(axis, moved, parts, low, [index - low for index in moved[low:high]])
    for attempt in (_named_blocks, _rope, _rotated, _reversed, _exchanged, _blocks_exchanged, _in_turn):
        if (found := attempt(one)) is not None:
            return found
    return Diagnosis(f"{_code(axis)}_permuted", f"{axis_name(axis)} permuted: {_shown(moved)}")


def _named_blocks(one: _Moved) -> Diagnosis | None:
    for what, size in one.parts.items():
        if (blocks := _blocks(one.order, size)) is not None:
            return Diagnosis(f"{what.replace(' ', '_')}s_exchanged", _of_blocks(axis_name(one.axis), what, blocks))
    return None


def _rotated(one: _Moved) -> Diagnosis | None:
    shift = _rotation(one.order)
    if shift is None:
        return None
    how = _blocks_of(shift, len(one.order), one.parts)
    text = f"{axis_name(one.axis)} rotated by {shift}{how}: 0 holds a's {one.order[0]}"
    return Diagnosis(f"{_code(one.axis)}_rotated", text)


def _reversed(one: _Moved) -> Diagnosis | None:
    size = len(one.inner)
    if size <= 3 or list(one.inner) != list(range(size))[::-1]:
        return None
    where = "" if size == len(one.order) else f" {one.low}-{one.low + size - 1}"
    return Diagnosis(f"{_code(one.axis)}_reversed", f"{axis_name(one.axis)}{where} in reverse order")


def _exchanged(one: _Moved) -> Diagnosis | None:
    if one.pairs is None:
        return None
    swaps = ", ".join(f"{i} and {j}" for i, j in one.pairs)
    return Diagnosis(f"{_code(one.axis)}_exchanged", f"{axis_name(one.axis)} {swaps} exchanged")


def _blocks_exchanged(one: _Moved) -> Diagnosis | None:
    size = _equal_blocks(one.order)
    blocks = None if size is None else _blocks(one.order, size)
    if blocks is None:
        return None
    text = _of_blocks(axis_name(one.axis), f"block of {size}", blocks).replace(f"block of {size}s", f"blocks of {size}")
    return Diagnosis(f"{_code(one.axis)}_exchanged", text)


def _in_turn(one: _Moved) -> Diagnosis | None:
    text = _halves_or_pairs(one.inner)
    return None if text is None else Diagnosis(f"{_code(one.axis)}_interleaved", f"{axis_name(one.axis)} {text}")


def _pairs(order: Sequence[int], most: int = 4) -> list[tuple[int, int]] | None:
    """The exchanged indices of a permutation that is at most so many exchanges of two."""
    pairs = [(i, j) for i, j in enumerate(order) if i < j and order[j] == i]
    return pairs if len(pairs) * 2 == sum(i != j for i, j in enumerate(order)) and len(pairs) <= most else None


def describe_copies(axis: str, found: Sequence[int | None], differing: Sequence[int]) -> Diagnosis | None:
    """Where the differing indices hold what other indices of a do, without being a permutation; None where not so."""
    pairs = [(index, found[index]) for index in differing]
    if any(origin is None for _, origin in pairs) or not pairs:
        return None
    known = [(index, origin) for index, origin in pairs if origin is not None]
    shifts = {origin - index for index, origin in known}
    where, first = ranges([index for index, _ in known]), known[0]
    if len(shifts) == 1:
        text = f"{axis_name(axis)} {where} hold a's {ranges([origin for _, origin in known])}"
        return Diagnosis(f"{_code(axis)}_shifted", text)
    text = f"{axis_name(axis)} {where} hold copies of others (the first: {first[0]} holds a's {first[1]})"
    return Diagnosis(f"{_code(axis)}_copied", text)


def ranges(numbers: Sequence[int], most: int = 8) -> str:
    """Numbers as ranges: 0-3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:most]]
    return ", ".join(shown) + (f" and {len(runs) - most} more" if len(runs) > most else "")


def _code(axis: str) -> str:
    words = {"gq": "query_heads", "q": "query_heads", "d": "head_dims", "f": "mlp_rows", "x": "expert_rows",
             "v": "vocabulary_rows", "n": "attention_heads", "h": "channels"}  # fmt: skip
    return words.get(axis, re.sub(r"\W+", "_", axis_name(axis).split(" of ")[0]))


def _span(moved: Sequence[int]) -> tuple[int, int]:
    """The smallest range of indices that holds all that moved."""
    away = [index for index, origin in enumerate(moved) if index != origin]
    return (away[0], away[-1] + 1) if away else (0, len(moved))


def _blocks(moved: Sequence[int], size: int) -> list[int] | None:
    """The permutation as one of whole blocks of a size; None where it is none."""
    if size < 1 or size >= len(moved) or len(moved) % size:
        return None
    order = []
    for start in range(0, len(moved), size):
        first = moved[start]
        if first % size or list(moved[start : start + size]) != list(range(first, first + size)):
            return None
        order.append(first // size)
    return order


def _equal_blocks(moved: Sequence[int]) -> int | None:
    """The largest size of blocks that move as wholes, at least 2."""
    for size in range(len(moved) // 2, 1, -1):
        if len(moved) % size == 0 and _blocks(moved, size) is not None:
            return size
    return None


def _of_blocks(name: str, what: str, blocks: Sequence[int]) -> str:
    if (pairs := _pairs(blocks)) is not None:
        return f"{name}: {what}s {', '.join(f'{i} and {j}' for i, j in pairs)} exchanged"
    return f"{name}: {what}s permuted: {_shown(blocks)}"


def _rotation(moved: Sequence[int]) -> int | None:
    size = len(moved)
    shift = moved[0]
    if size > 2 and shift and all(origin == (index + shift) % size for index, origin in enumerate(moved)):
        return shift if shift <= size // 2 else shift - size
    return None


def _blocks_of(shift: int, size: int, parts: Mapping[str, int]) -> str:
    for what, block in parts.items():
        if block > 0 and size % block == 0 and shift % block == 0 and size > block:
            return f" ({abs(shift) // block} {what}{'s' if abs(shift) > block else ''})"
    return ""


def _rope(one: _Moved) -> Diagnosis | None:
    """The two orders of rope dims."""
    text = _halves_or_pairs(one.inner) if one.axis in ROPE else None
    if text is None:
        return None
    return Diagnosis("rope_interleaved" if text.startswith("as n") else "rope_halves", f"rope rows {text}")


def _halves_or_pairs(inner: Sequence[int]) -> str | None:
    """Halves (0, n/2, 1, ...) for neighbouring pairs (0, 1, ...), or the other way round."""
    # the first and the last index have the same place in both orders, so the span that moved lacks them
    for edge in (0, 1):
        size = len(inner)
        whole = [*range(edge), *(index + edge for index in inner), *range(size + edge, size + 2 * edge)]
        if (text := _interleaved(whole)) is not None:
            return text
    return None


def _interleaved(moved: Sequence[int]) -> str | None:
    size = len(moved)
    if size < 4 or size % 2:
        return None
    half = size // 2
    pairs = [index // 2 + half * (index % 2) for index in range(size)]
    if list(moved) == pairs:
        return "as neighbouring pairs where a has two halves"
    if list(moved) == [2 * index if index < half else 2 * (index - half) + 1 for index in range(size)]:
        return "as two halves where a has neighbouring pairs"
    return None


def _shown(order: Sequence[int], most: int = 12) -> str:
    return "a's " + ", ".join(map(str, order[:most])) + (", ..." if len(order) > most else "")
