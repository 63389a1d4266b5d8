"""`diff`: do two checkpoints hold the same tensors, across formats, layouts and names, and if not, what differs?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from shardtool.checkpoint.opened import fold
from shardtool.diff import prints
from shardtool.diff.diagnose import Diagnosing, component_names
from shardtool.diff.permutations import Diagnosis, ranges
from shardtool.diff.report import DiffReport, Finding
from shardtool.diff.sides import Ids, Pair, Side, Wrong, name_axes, open_pair
from shardtool.execute import engine
from shardtool.execute.engine import Progress
from shardtool.families.family import TRAINING_ONLY, describe_differences
from shardtool.formats.stored import ITEMSIZE
from shardtool.layout.equation import Tensor
from shardtool.layout.layout import Layout, Piece
from shardtool.layout.rules import LAYER, Rule
from shardtool.plan.plan import common


def diff(a: Path, b: Path, *, say: Callable[[str], None] | None = None, progress: Progress | None = None) -> DiffReport:
    """Compare two checkpoints, Hugging Face or Megatron each; `a` is the reference.

    Whatever does not fit is a finding. CheckpointError or UsageError where a directory cannot be read at all.
    """
    tell = say or (lambda _: None)
    tell("reading headers")
    pair = open_pair(a, b)
    findings = [*_structure(pair)]
    tell("comparing values")
    compared, values = _values(pair, progress, tell)
    findings += values
    labels = (pair.a.said.label, pair.b.said.label)
    return DiffReport(str(a), str(b), labels, compared, tuple(findings), tuple(_notes(pair)))


def compared_bytes(b: Path) -> int:
    """About the bytes that the comparison goes through, for a progress bar."""
    return sum(file.stat().st_size for file in b.rglob("*") if file.is_file())


def _notes(pair: Pair) -> Iterator[str]:
    """Differences of the configs: no tensors, but another model."""
    ours, theirs = pair.a.said.architecture, pair.b.said.architecture
    if ours is None or theirs is None:
        return
    ignore = {"family", "vocab_size", "max_positions", "zero_out_bias", *TRAINING_ONLY}
    for line in describe_differences(ours, theirs, frozenset(ignore)):
        yield f"the configs differ: {line}"


# --- what is there ---------------------------------------------------------------------------------------------------


def _structure(pair: Pair) -> Iterator[Finding]:
    a, b = pair.a, pair.b
    yield from _names(pair)
    for unlike in pair.unlike:
        names = [_spelled(side, side.rules[unlike.key], None) for side in (a, b)]
        yield Finding("shape", names[0], names[1], _transposed(pair, unlike.key), f"{unlike.a} in a, {unlike.b} in b")
    for side, name in ((a, "a"), (b, "b")):
        for key, items in side.wrong.items():
            yield _wrong_shape(pair, side, name, key, items)
        for tensor, expected, found in (side.said.wrong or {}).values():
            detail = f"{list(found)} in {name}, whose own model has {list(expected)}"
            yield Finding("shape", *_two(side, a, (tensor,)), (), detail)
    if pair.vocab[0] != pair.vocab[1]:
        yield from _rows(pair)


def _two(side: Side, a: Side, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (names, ()) if side is a else ((), names)


def _names(pair: Pair) -> Iterator[Finding]:
    """Tensors that one side has and the other has not."""
    a, b = pair.a, pair.b
    shaped = {unlike.key for unlike in pair.unlike} | {key for side in (a, b) for key in (side.said.wrong or {})}
    for key in dict.fromkeys((*a.rules, *b.rules)):
        ours, theirs = a.held.get(key, frozenset()), b.held.get(key, frozenset())
        if key in shaped:
            continue
        odd = [{_rule_place(side, key, item) for item in side.wrong.get(key, ())} for side in (a, b)]
        missing = [ids for ids in sorted(ours - theirs) if ids not in odd[1]]
        extra = [ids for ids in sorted(theirs - ours) if ids not in odd[0]]
        if missing:
            yield Finding("missing", _spelled(a, a.rules[key], missing), ())
        if extra:
            yield Finding("extra", (), _spelled(b, b.rules[key], extra))
        if key in a.rules and key in b.rules:
            both = [_all_ids(side, key) for side in (a, b)]
            neither = sorted((both[0] & both[1]) - ours - theirs - odd[0] - odd[1])
            if neither:
                names = [_spelled(side, side.rules[key], neither) for side in (a, b)]
                yield Finding("missing", names[0], names[1], (), "in neither")
    if a.unknown:
        yield Finding("missing", tuple(fold(a.unknown)), (), (), "a's own architecture does not know it either")
    if b.unknown:
        yield Finding("extra", (), tuple(fold(b.unknown)), (), "b's own architecture does not know it either")


def _all_ids(side: Side, key: str) -> set[Ids]:
    rule, sizes = side.rules[key], side.said.layout.sizes
    axes = name_axes(rule)
    found: set[Ids] = {()}
    for axis in axes:
        values = rule.ids(sizes[LAYER]) if axis == LAYER else range(sizes[axis])
        found = {(*ids, value) for ids in found for value in values}
    return found


def _rule_place(side: Side, key: str, item: Wrong) -> Ids:
    held = {axis.axis: value for axis, value in zip(item.piece.names, item.ids, strict=True)}
    return tuple(held.get(axis, -1) for axis in name_axes(side.rules[key]))


def _wrong_shape(pair: Pair, side: Side, name: str, key: str, items: Sequence[Wrong]) -> Finding:
    names = tuple(fold(item.key[1] + (f" in {item.key[0]}" if item.key[0] else "") for item in items))
    first = items[0]
    detail = f"{list(first.found)} in {name}, whose own model has {list(first.expected)}"
    found = _other_shape(pair, side, key, items)
    return Finding("shape", *_two(side, pair.a, names), (found,) if found else (), detail)


def _other_shape(pair: Pair, side: Side, key: str, items: Sequence[Wrong]) -> Diagnosis | None:
    """A tensor of a wrong shape that holds the other side's values: transposed, or with more rows."""
    other = pair.b if side is pair.a else pair.a
    if key not in pair.keys:
        return None
    number = pair.keys.index(key)
    dims = side.layout.rules[number].target.dims
    tries: list[tuple[str, dict[str, int]]] = []
    if all(item.found == item.expected[::-1] and len(item.found) == 2 for item in items):
        tries.append(("transposed", {}))
    rows = {item.found[0] for item in items}
    if dims[0] == ("v",) and len(rows) == 1 and all(item.found[1:] == item.expected[1:] for item in items):
        tries.append(("padded_rows", {"v": rows.pop()}))
    dtype = side.said.headers[items[0].key].dtype
    for code, allocated in tries:
        kept = [piece for piece in side.layout.pieces if piece.rule == number and not piece.replica]
        mended = [_mended(item, number, turned=code == "transposed") for item in items if not item.piece.replica]
        layout = replace(side.layout, pieces=tuple(kept + mended), allocated={**side.layout.allocated, **allocated})
        if layout.sizes.get("v", 0) > layout.allocated.get("v", 0):
            continue
        read = prints.components(layout, side.said.locate, number, dtype)
        wanted = prints.components(other.layout, other.said.locate, number, dtype)
        both = read.keys() & wanted.keys()
        if both and all(read[place].total == wanted[place].total for place in both):
            more = items[0].found[0] - items[0].expected[0]
            text = "transposed, with the same values" if code == "transposed" else f"{more} rows of padding"
            return Diagnosis(code, text)
    return None


def _mended(item: Wrong, number: int, *, turned: bool) -> Piece:
    """The piece of one tensor of a wrong shape, as it is there."""
    names = tuple(replace(axis, ids=(value,)) for axis, value in zip(item.piece.names, item.ids, strict=True))
    dims = Tensor(item.piece.dims.dims[::-1]) if turned else item.piece.dims
    return replace(item.piece, rule=number, names=names, dims=dims)


def _transposed(pair: Pair, key: str) -> tuple[Diagnosis, ...]:
    """Two directories that are known by name alone: the same matrix, transposed."""
    a, b = pair.a, pair.b
    rules = [side.rules[key] for side in (a, b)]
    shapes = [rule.target.shape(side.said.layout.sizes) for rule, side in zip(rules, (a, b), strict=True)]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1][::-1] or name_axes(rules[0]):
        return ()
    sums = []
    for side, rule, turned in ((a, rules[0], False), (b, rules[1], True)):
        number = next(at for at, one in enumerate(side.said.layout.rules) if one.megatron == key)
        dims = Tensor(rule.target.dims[::-1]) if turned else rule.target
        key_of = next(piece.key(()) for piece in side.said.layout.pieces if piece.rule == number)
        dtype = side.said.headers[key_of].dtype
        probe = prints.probing(side.said.layout, number, [dims])
        sums.append(prints.whole(side.said.layout, side.said.locate, dtype, probe))
    return (Diagnosis("transposed", "transposed, with the same values"),) if sums[0] == sums[1] else ()


def _rows(pair: Pair) -> Iterator[Finding]:
    """Vocabularies of different sizes: what the further rows hold."""
    low, high = sorted(pair.vocab)
    side = pair.a if pair.vocab[0] == high else pair.b
    for number, key in enumerate(pair.keys):
        rule = side.layout.rules[number]
        if "v" not in {axis for dim in rule.target.dims for axis in dim if isinstance(axis, str)}:
            continue
        dtype = next(iter(_dtypes(side, number)), None)
        if dtype is None:
            continue
        longer = replace(side.layout, sizes={**side.layout.sizes, "v": high})
        held = prints.components(longer, side.said.locate, number, dtype).get((0, ()))
        if held is None:
            continue
        further = {int(value) for value in held.axes["v"][low:high]}
        what = "all zeros" if further == {0} else "all alike" if len(further) == 1 and high - low > 1 else "with values"
        code = "padded_rows" if what != "with values" else "more_rows"
        names = [_spelled(one, one.rules[key], None) for one in (pair.a, pair.b)]
        said = Diagnosis(code, f"{'a' if side is pair.a else 'b'} has {high - low} more rows, {what}")
        yield Finding("shape", names[0], names[1], (said,), f"{pair.vocab[0]} rows in a, {pair.vocab[1]} in b")


# --- what the values are ---------------------------------------------------------------------------------------------


def _values(pair: Pair, progress: Progress | None, tell: Callable[[str], None]) -> tuple[int, list[Finding]]:
    """Compare all that both have: the elements compared, and a finding for each rule that differs."""
    a, b = pair.a, pair.b
    compared, differences = engine.compare(common(a.layout, b.layout), a.said.locate, b.said.locate, progress=progress)
    more, twins = _twins(a.layout, a)
    pieces = dict(b.layout.tensors()) if differences else {}
    by_rule: dict[int, list[engine.Difference]] = defaultdict(list)
    copies: dict[int, list[engine.Difference]] = defaultdict(list)
    for item in differences:
        piece = pieces[item.key]
        (copies if piece.replica else by_rule)[piece.rule].append(item)
    findings = [_copies(twins, a, pair)] if twins else []
    apart = [item for number, items in copies.items() if number not in by_rule for item in items]
    findings += [_copies(apart, b, pair)] if apart else []
    diagnosing = Diagnosing(pair)
    for number, key in enumerate(pair.keys):
        dtypes = [_dtypes(side, number) for side in (a, b)]
        if all(dtypes):
            if number in by_rule:
                tell(f"diagnosing {key}")
            findings += _of_rule(pair, number, dtypes, by_rule.get(number, []), diagnosing)
    return compared + more, findings


def _twins(layout: Layout, side: Side) -> tuple[int, list[engine.Difference]]:
    """A side's replicas, compared with what they are replicas of."""
    replicas = replace(layout, pieces=tuple(piece for piece in layout.pieces if piece.replica))
    if not replicas.pieces:
        return 0, []
    return engine.compare(common(layout, replicas), side.said.locate, side.said.locate)


def _copies(differences: Iterable[engine.Difference], side: Side, pair: Pair) -> Finding:
    found = list(differences)
    names = tuple(fold(item.key[1] + (f" in {item.key[0]}" if item.key[0] else "") for item in found))
    elements, bad = sum(item.total for item in found), sum(item.elements for item in found)
    return Finding("copies", *_two(side, pair.a, names), (), "", elements, bad)


def _dtypes(side: Side, number: int) -> tuple[str, ...]:
    """The dtypes of a rule's tensors."""
    pieces = [piece for piece in side.layout.pieces if piece.rule == number and not piece.replica]
    return tuple(sorted({side.said.headers[key].dtype for piece in pieces for key in piece.all_keys()}))


def _spelled(
    side: Side, rule: Rule, ids: Collection[Ids] | None, parts: Collection[int] | None = None
) -> tuple[str, ...]:
    """The names of a rule's tensors as a side has them, with layers and experts as ranges; those of some components."""
    axes = name_axes(rule)
    held = side.held.get(rule.megatron, frozenset()) if ids is None else ids
    patterns = rule.hf if side.layout.side == 0 else (rule.megatron,)
    if parts and len(patterns) == rule.target.components:
        patterns = tuple(name for at, name in enumerate(patterns) if at in parts)
    shift = {"m": side.said.layout.sizes.get(LAYER, 0) if side.layout.side == 0 else 0}
    names = []
    for pattern in patterns:
        name = pattern
        for at, axis in enumerate(axes):
            values = sorted({one[at] + shift.get(axis, 0) for one in held})
            shown = ranges(values).replace(", ", ",")
            name = name.replace("{" + axis + "}", shown if len(values) == 1 else "{" + shown + "}")
        names.append(name)
    return tuple(names)


def _of_rule(
    pair: Pair, number: int, dtypes: Sequence[tuple[str, ...]], differences: Sequence[engine.Difference],
    diagnosing: Diagnosing,
) -> Iterator[Finding]:  # fmt: skip
    """The findings of one rule: another dtype, other values."""
    rule = pair.a.layout.rules[number]
    differ = dtypes[0] != dtypes[1]
    said: tuple[Diagnosis, ...] = ()
    if differ and not differences:
        narrower = ITEMSIZE[dtypes[1][0]] < ITEMSIZE[dtypes[0][0]]
        said = (Diagnosis("rounded" if narrower else "same_values",
                          f"b is a rounded to {dtypes[1][0]}" if narrower else "the same values"),)  # fmt: skip
    values: Finding | None = None
    if differences:
        found = diagnosing.rule(number, (dtypes[0][0], dtypes[1][0]))
        if found.places or not found.complete:
            ids = sorted({ids for _, ids in found.places}) or None
            parts = {component for component, _ in found.places}
            names = [_spelled(side, side.layout.rules[number], ids, parts) for side in (pair.a, pair.b)]
            total, bad = sum(item.total for item in differences), sum(item.elements for item in differences)
            texts = tuple(_grouped(rule, found.places))
            values = Finding("values", names[0], names[1], texts, "; ".join(found.details), total, bad)
        elif differ:  # equal in the narrower dtype, which is a's
            said = (Diagnosis("rounded", f"a is b rounded to {dtypes[0][0]}"),)
        # else the stored numbers differ by what a factor between the two is rounded to, and the components do not
    if differ:
        names = [_spelled(side, side.layout.rules[number], None) for side in (pair.a, pair.b)]
        yield Finding("dtype", names[0], names[1], said, f"{', '.join(dtypes[0])} in a, {', '.join(dtypes[1])} in b")
    if values is not None:
        yield values


def _grouped(rule: Rule, places: Mapping[tuple[int, Ids], Diagnosis | None]) -> Iterator[Diagnosis]:
    """The diagnoses of a rule's components, each once: with the components and layers that it is about."""
    unknown = Diagnosis("unknown", "no transform that is known here explains it")
    groups: dict[Diagnosis, list[tuple[int, Ids]]] = defaultdict(list)
    for place, said in places.items():
        groups[said or unknown].append(place)
    everything = {ids for _, ids in places}
    for said, held in groups.items():
        parts = sorted({component for component, _ in held})
        names = component_names(rule)
        text = said.text
        if 0 < len(parts) < len(names) and " and ".join(names[part] for part in parts) not in text:
            text = f"{', '.join(names[part] for part in parts)}: {text}"
        ids = {ids for _, ids in held}
        if ids != everything:
            text += f" ({_where(rule, ids)})"
        yield Diagnosis(said.code, text)


def _where(rule: Rule, ids: Collection[Ids]) -> str:
    words = {"l": "layer", "e": "expert", "m": "MTP layer"}
    said = []
    for at, axis in enumerate(name_axes(rule)):
        values = sorted({one[at] for one in ids})
        said.append(f"{words[axis]}{'s' if len(values) > 1 else ''} {ranges(values)}")
    return ", ".join(said)
