"""EXPLAIN: a plan in plain text, one block per rule. Says what is read, how it is laid out anew, and how it is cut."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import takewhile
from math import prod
from typing import Any

from shardtool.layout.codecs import describe
from shardtool.layout.equation import component_axes
from shardtool.layout.layout import Layout, Piece
from shardtool.layout.rules import MTP
from shardtool.plan.copies import Copy, Plan

PADDING = {"zeros": "zeros", "last": "the last row repeated", "mean": "the mean of the rows"}


def explain(
    plan: Plan, dtypes: Mapping[int, str] | None = None, written_bytes: Counter[str] | None = None
) -> list[str]:
    """A plan as lines of text. `dtypes` (by identity of the target's pieces) adds bytes and dtypes.

    `written_bytes` are those that `bytes_written` finds, where they are known already.
    """
    read, written, copies = _by_rule(plan.src.pieces), _by_rule(plan.dst.pieces), _copies_by_rule(plan)
    if dtypes is not None and written_bytes is None:
        written_bytes = bytes_written(plan, dtypes)
    lines = _header(plan, written_bytes)
    for number in written:
        held = written[number]
        ours, theirs = (
            layout.rules[number].equation.text.split("->")[layout.side].strip() for layout in (plan.src, plan.dst)
        )
        if not copies[number]:
            filled = ", ".join(dict.fromkeys(f"{piece.constant:g}" for piece in held if piece.constant is not None))
            lines += [
                "",
                f"{_names(held)}",
                f"  write    {_tensors(plan.dst, held, dtypes)}",
                f"  values   {filled} everywhere",
            ]
            continue
        lines += [
            "",
            f"{_names(read[number])} -> {_names(held)}",
            f"  layout   {ours} -> {theirs}",
            f"  sizes    {_sizes(plan, held)}",
            f"  read     {_tensors(plan.src, read[number])}",
            f"  write    {_tensors(plan.dst, held, dtypes)}",
            f"  copies   {_copies(copies[number])}",
        ]
        lines += [f"  values   {text}" for text in _values(copies[number])]
        lines += [f"  padding  {text}" for text in _padding(plan, read[number], held)]
    return lines


def summary(plan: Plan) -> dict[str, Any]:
    """What a plan comes to, in numbers: tensors, elements and copies with the layers counted, templates without."""
    return {
        "from": plan.src.description,
        "to": plan.dst.description,
        "layers": plan.dst.sizes.get("l", 0),
        "rules": len(_by_rule(plan.dst.pieces)),
        "tensors_read": _count(plan.src.pieces),
        "tensors_written": _count(plan.dst.pieces),
        "replicas_read": _count(piece for piece in plan.src.pieces if piece.replica),
        "replicas_written": _count(piece for piece in plan.dst.pieces if piece.replica),
        "elements_written": sum(prod(plan.dst.shape(piece)) * piece.instances for piece in plan.dst.pieces),
        "padding_elements": sum(region.volume * region.piece.instances for region in plan.fills)
        + sum(copy.volume * _instances(copy) for copy in plan.copies if _repeats(copy)),
        "cut_elements": sum(region.volume * region.piece.instances for region in plan.cuts),
        "copies": sum(_instances(copy) for copy in plan.copies),
        "copy_templates": len(plan.copies),
        "digest": plan.digest(),
    }


def _header(plan: Plan, sizes: Counter[str] | None) -> list[str]:
    facts = summary(plan)
    replicas = f", {facts['replicas_written']:,} of them replicas" if facts["replicas_written"] else ""
    lines = [
        f"from     {plan.src.description}",
        f"to       {plan.dst.description}",
        f"layers   {facts['layers']}",
        f"tensors  {facts['tensors_read']:,} read, {facts['tensors_written']:,} written{replicas}",
    ]
    if sizes is not None:
        kinds = ", ".join(f"{dtype} {_bytes(size)}" for dtype, size in sizes.most_common())
        lines.append(f"bytes    {_bytes(sizes.total())} written: {kinds}")
    return [*lines, f"copies   {facts['copies']:,}"]


def bytes_written(plan: Plan, dtypes: Mapping[int, str]) -> Counter[str]:
    """The payload of the target's tensors by dtype; `dtypes` by identity of the piece."""
    sizes: Counter[str] = Counter()
    for piece in plan.dst.pieces:
        dtype = dtypes[id(piece)]
        sizes[dtype] += prod(plan.dst.shape(piece)) * piece.instances * _width(dtype)
    return sizes


def _by_rule(pieces: Iterable[Piece]) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        found[piece.rule].append(piece)
    return found


def _copies_by_rule(plan: Plan) -> dict[int, list[Copy]]:
    found: dict[int, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        found[copy.dst.rule].append(copy)
    return found


def _count(pieces: Iterable[Piece]) -> int:
    return sum(piece.instances for piece in pieces)


def _instances(copy: Copy) -> int:
    return prod(len(loop.ids) for loop in copy.loops)


def _repeats(copy: Copy) -> bool:
    """Whether a copy repeats a row into padding."""
    return 0 in copy.src_strides


def _names(pieces: list[Piece]) -> str:
    """The names of tensors, ids as ranges: `model.layers.{0-31}.self_attn.{q,k,v}_proj.weight`."""
    primary = [piece for piece in pieces if not piece.replica] or pieces
    ids: dict[str, set[int]] = defaultdict(set)
    for piece in primary:
        for axis in piece.names:  # layers and experts by their global number; MTP layers as the name has it
            shift = axis.shift if axis.axis == MTP else 0
            ids[axis.axis].update(number - shift for number in axis.ids)
    shown = dict.fromkeys(piece.name for piece in primary)
    # a torch_dist checkpoint with a key per layer spells the number out: one piece per layer
    folded: dict[str, set[int]] = defaultdict(set)
    for name in shown:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        place = name[: number.start()] + "{}" + name[number.end() :] if number else name
        folded[place].update({int(number[0])} if number else ())
    texts = [place.replace("{}", _braced(numbers)) for place, numbers in folded.items()]
    for letter, numbers in ids.items():
        texts = [text.replace(f"{{{letter}}}", _braced(numbers)) for text in texts]
    return _together(texts)


def _together(names: list[str]) -> str:
    """Names with what they have in common said once."""
    start = _common(names)
    rests = [name.removeprefix(start) for name in names]
    end = _common([rest[::-1] for rest in rests])[::-1]
    middles = [rest.removesuffix(end) for rest in rests]
    return start + (f"{{{','.join(middles)}}}{end}" if len(names) > 1 else "")


def _common(texts: list[str]) -> str:
    """What all texts begin with."""
    return "".join(letters[0] for letters in takewhile(lambda row: len(set(row)) == 1, zip(*texts, strict=False)))


def _braced(numbers: Iterable[int]) -> str:
    """Numbers as ranges: {0-3,7}; one number stands alone."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{{{text}}}" if "-" in text or "," in text else text


def _sizes(plan: Plan, pieces: list[Piece]) -> str:
    return ", ".join(f"{axis} {plan.dst.sizes[axis]:,}" for axis in _axes(pieces))


def _axes(pieces: list[Piece]) -> list[str]:
    """The axes of a rule's tensors, in order."""
    return list(
        dict.fromkeys(
            axis
            for piece in pieces
            for component in range(piece.dims.components)
            for axis in component_axes(piece.dims, component)
        )
    )


def _tensors(layout: Layout, pieces: list[Piece], dtypes: Mapping[int, str] | None = None) -> str:
    """How many tensors of which shapes and dtypes, and how they are cut: `64 of 8 x 16, axis g in 2 parts of 4`."""
    shapes: Counter[str] = Counter()
    for piece in pieces:
        dtype = "" if dtypes is None else f" {dtypes[id(piece)]}"
        shapes[" x ".join(map(str, layout.shape(piece))) + dtype] += piece.instances
    listed = [f"{count:,} of {shape}" for shape, count in list(shapes.items())[:4]]
    if len(shapes) > len(listed):
        listed.append(f"{sum(list(shapes.values())[4:]):,} of other shapes")
    cuts = _cuts([piece for piece in pieces if not piece.replica] or pieces)
    if replicas := _count(piece for piece in pieces if piece.replica):
        cuts.append(f"{replicas:,} of them replicas")
    return ", ".join([*listed, *cuts])


def _cuts(pieces: list[Piece]) -> list[str]:
    """The axes and dims along which tensors are cut."""
    ranges: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for piece in pieces:
        for axis, low, high in piece.ranges:
            ranges[f"axis {axis}"].add((low, high))
        for dim, bounds in enumerate(piece.window or ()):
            ranges[f"dim {dim}"].add(bounds)
    found = []
    for place, parts in ranges.items():
        lengths = {high - low for low, high in parts}
        if len(parts) > 1:
            length = f" of {next(iter(lengths)):,}" if len(lengths) == 1 else ""
            found.append(f"{place} in {len(parts)} parts{length}")
    return found or ["whole"]


def _copies(copies: list[Copy]) -> str:
    """How many copies, the shape of the largest, and how many elements of it lie side by side on both sides."""
    real = [copy for copy in copies if not _repeats(copy)]
    largest = max(real, key=lambda copy: copy.volume)
    wide = [(axis, size) for axis, size in zip(largest.axes, largest.shape, strict=True) if size > 1]
    shape = " x ".join(str(size) for _, size in wide) + f" ({' '.join(axis for axis, _ in wide)})" if wide else "1"
    return f"{sum(map(_instances, real)):,}, largest {shape}, runs of {_run(largest):,} elements"


def _values(copies: list[Copy]) -> list[str]:
    """What happens to the values of tensors whose two sides store them in different ways."""
    changed = dict.fromkeys((copy.src.name, copy.dst.name, *copy.codecs) for copy in copies if copy.changed)
    return list(
        dict.fromkeys(
            f"{src}: {describe(read)}; {dst}: {describe(written)}; in fp32, rounded once"
            for src, dst, read, written in changed
        )
    )


def _run(copy: Copy) -> int:
    """The number of elements that are contiguous in source and target."""
    run = 1
    for size, src, dst in reversed(list(zip(copy.shape, copy.src_strides, copy.dst_strides, strict=True))):
        if size != 1:
            if (src, dst) != (run, run):
                break
            run *= size
    return run


def _padding(plan: Plan, read: list[Piece], written: list[Piece]) -> list[str]:
    found = []
    for layout, pieces, what in (
        (plan.dst, written, f"are filled with {PADDING[plan.pad]}"),
        (plan.src, read, "of the source are left out"),
    ):
        axes = _axes(pieces)
        rows = sum(size - layout.sizes[axis] for axis, size in layout.allocated.items() if axis in axes)
        if rows:
            found.append(f"{rows:,} rows {what}")
    return found


def _width(dtype: str) -> int:
    """Bytes of an element of a torch dtype, from its name."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
