"""The two sides of a diff: what each checkpoint says it is and what it has, brought to a common set of rules.

Nothing has to fit. A tensor that is not there, has another shape or is known to one side alone is a finding; what is
left can be compared component by component, whatever the formats, layouts and names.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from shardtool.checkpoint.constants import broken_constants
from shardtool.checkpoint.huggingface import describe_huggingface, read_config, read_tensors
from shardtool.checkpoint.megatron import IGNORED, Megatron, read_megatron
from shardtool.checkpoint.opened import Header, Opened
from shardtool.checkpoint.structure import structure
from shardtool.diff.permutations import axis_name
from shardtool.errors import ShardtoolError, UsageError
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import axis_sizes, standard
from shardtool.families.family import Family
from shardtool.families.registry import FAMILIES
from shardtool.formats.detect import detect
from shardtool.formats.stored import Stored
from shardtool.layout.equation import Equation, Tensor, component_axes
from shardtool.layout.layout import Key, Layout, Piece
from shardtool.layout.mesh import Mesh
from shardtool.layout.rules import EXPERT, LAYER, MTP, Rule, named_axes

Ids = tuple[int, ...]  # of the axes in a rule's name, in the order of `name_axes`


class Wrong(Struct, frozen=True):
    """A stored tensor whose shape is not that of its model. `ids` are those of the piece's own name axes."""

    piece: Piece
    ids: Ids
    key: Key
    expected: tuple[int, ...]
    found: tuple[int, ...]


class Stated(Struct, frozen=True):
    """What a checkpoint says it is: its rules by Megatron key, and where their components should lie.

    `wrong` are whole tensors of another shape than the model's (torch_dist): expected and found, by the rule's key.
    """

    path: Path
    label: str
    architecture: Architecture | None
    family: Family | None
    mesh: Mesh
    vocab_size: int | None  # None: the checkpoint does not know where its padding begins
    padded_vocab: int
    layout: Layout
    headers: Mapping[Key, Header]
    locate: Callable[[Key], Stored]
    ignored: tuple[str, ...] = ()
    wrong: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]] | None = None


class Side(Struct, frozen=True):
    """A side fitted to the common rules: `layout` has only what is there, in its shape, with the common numbering.

    `held` are the ids of each rule that are complete, `wrong` the tensors of another shape, both by the rule's key.
    `unknown` are names that no rule of this side has.
    """

    said: Stated
    layout: Layout
    rules: Mapping[str, Rule]
    held: Mapping[str, frozenset[Ids]]
    wrong: Mapping[str, tuple[Wrong, ...]]
    unknown: tuple[str, ...]


class Unlike(Struct, frozen=True):
    """A rule that the sides cannot compare: its axes have other sizes, or its components are others."""

    key: str
    a: str
    b: str


class Pair(Struct, frozen=True):
    """Both sides over the same rules: rule number n of either layout is `keys[n]`."""

    a: Side
    b: Side
    keys: tuple[str, ...]
    unlike: tuple[Unlike, ...]
    vocab: tuple[int, int]  # logical rows of each side; the smaller is compared


def name_axes(rule: Rule) -> tuple[str, ...]:
    """The axes in a rule's name, in a fixed order."""
    return tuple(axis for axis in (LAYER, EXPERT, MTP) if axis in named_axes(rule.megatron))


def open_pair(a: Path, b: Path) -> Pair:
    """Read the headers of both checkpoints. CheckpointError or UsageError where one cannot be read at all."""
    kinds = [detect(path).kind.startswith("hf_") for path in (a, b)]
    megatron = not all(kinds)
    family = next((_family(path, megatron) for path, hf in zip((a, b), kinds, strict=True) if hf), None)
    plain = all(kinds) and (family is None or _family(b, megatron) is None)
    said = [
        _plain(path) if plain else _huggingface(path, megatron) if hf else _megatron(path, family)
        for path, hf in zip((a, b), kinds, strict=True)
    ]
    return _pair(said[0], said[1], named=all(kinds))


def _family(path: Path, megatron: bool) -> Family | None:
    """The family of a directory, None where it is not known or not convertible: its tensors go by their names then."""
    try:
        return describe_huggingface(path, megatron=megatron).family
    except UsageError:
        return None


def _huggingface(path: Path, megatron: bool) -> Stated:
    said = describe_huggingface(path, megatron=megatron)
    a, layout, headers = said.architecture, said.layout(), said.headers()
    if any(rule.constant for rule in layout.rules):
        layout, headers = _without_constants(Opened(path, a, layout, headers, said.locate))
    return Stated(
        path, f"Hugging Face {said.family.model_type}", a, said.family, Mesh(), a.vocab_size, a.vocab_size,
        layout, headers, said.locate, said.family.ignored,
    )  # fmt: skip


def _without_constants(source: Opened) -> tuple[Layout, dict[Key, Header]]:
    """Layout and headers without the tensors that Megatron has no place for: zeros are nothing to compare.

    Where they are not what they must be they are tensors like others, which the other side has not.
    """
    layout = source.layout
    held = [piece for piece in layout.pieces if piece.constant is not None]
    there = tuple(p for p in held if all(key in source.headers for key in p.all_keys()))
    if len(there) < len(held) or broken_constants(replace(source, layout=replace(layout, pieces=there))):
        rules = tuple(replace(rule, constants=()) if rule.constant else rule for rule in layout.rules)
        pieces = tuple(replace(piece, constant=None) for piece in layout.pieces)
        return replace(layout, rules=rules, pieces=pieces), dict(source.headers)
    kept = [number for number, rule in enumerate(layout.rules) if not rule.constant]
    pieces = tuple(replace(p, rule=kept.index(p.rule)) for p in layout.pieces if p.constant is None)
    gone = {key for piece in held for key in piece.all_keys()}
    left = {key: header for key, header in source.headers.items() if key not in gone}
    return replace(layout, rules=tuple(layout.rules[number] for number in kept), pieces=pieces), left


def _plain(path: Path) -> Stated:
    """A directory whose architecture is not known: every tensor is a rule of its own."""
    config, stored = read_config(path), read_tensors(path)
    headers: dict[Key, Header] = {("", name, ()): Header(item.shape, item.dtype) for name, item in stored.items()}
    layout = plain_layout(headers)
    label = f"Hugging Face {config.get('model_type')}, by name"
    return Stated(path, label, None, None, Mesh(), 0, 0, layout, headers, lambda key: stored[key[1]])


def _megatron(path: Path, family: Family | None) -> Stated:
    source = read_megatron(path)
    a = structure(source)
    known = bool(source.args.get("vocab_size"))
    rules = _megatron_rules(a, family or FAMILIES.get(source.architecture.family))
    rules = tuple(rule for rule in rules if not rule.constant)
    layout = source.layout(rules, axis_sizes(a))
    wrong = {
        rules[number].megatron: (name, expected, found)
        for name, (number, expected, found) in source.wrong_global_shapes(rules, a).items()
    }
    return Stated(
        path, _label(source), a, family, source.mesh, a.vocab_size if known else None, source.padded_vocab,
        layout, source.headers, source.locate, IGNORED, wrong,
    )  # fmt: skip


def _megatron_rules(a: Architecture, family: Family | None) -> tuple[Rule, ...]:
    """The rules of a family where it has them for this structure, else those of any architecture."""
    try:
        return standard(a) if family is None else family.rules(a)
    except (ShardtoolError, ValueError, AttributeError, AssertionError):
        return standard(a)


def _label(source: Megatron) -> str:
    if source.format != "torch":
        return "Megatron torch_dist"
    mesh = source.mesh
    sizes = f"tp {mesh.tp} pp {mesh.pp}" + (f" vpp {mesh.vpp}" if mesh.vpp > 1 else "")
    return f"Megatron torch, {sizes}" + (f" ep {mesh.ep}" if mesh.ep > 1 else "")


def plain_layout(headers: Mapping[Key, Header]) -> Layout:
    """A rule for every tensor: its name, and axes that are its alone."""
    rules: list[Rule] = []
    pieces: list[Piece] = []
    sizes: dict[str, int] = {}
    for number, ((_, name, _), header) in enumerate(sorted(headers.items())):
        axes = tuple(f"t{zlib.crc32(name.encode()):08x}_{dim}" for dim in range(len(header.shape)))
        dims = Tensor(tuple((axis,) for axis in axes))
        sizes |= dict(zip(axes, header.shape, strict=True))
        rules.append(Rule((name,), Equation((dims,), (dims,), " ".join(axes), (0,)), _literal(name)))
        pieces.append(Piece(number, 0, dims, _literal(name)))
    return Layout(tuple(rules), 0, sizes, tuple(pieces), description="Hugging Face, by name")


def _literal(name: str) -> str:
    return re.sub(r"[{}]", "_", name)  # braces mark axes in names of rules


def _pair(a: Stated, b: Stated, *, named: bool) -> Pair:
    vocab = _vocabularies(a, b)
    if named and a.family is not None:
        a, b = _with_unknown(a, b)
    rules = [{rule.megatron: rule for rule in said.layout.rules} for said in (a, b)]
    keys, unlike = [], []
    for key, ours in rules[0].items():
        if key in rules[1]:
            different = _unlike(key, ours, rules[1][key], a.layout.sizes, b.layout.sizes)
            keys += [key] if different is None else []
            unlike += [different] if different is not None else []
    sides = [
        _fitted(said, {key: number for number, key in enumerate(keys)}, mine, min(vocab))
        for said, mine in zip((a, b), rules, strict=True)
    ]
    return Pair(sides[0], sides[1], tuple(keys), tuple(unlike), vocab)


def _vocabularies(a: Stated, b: Stated) -> tuple[int, int]:
    """The logical rows of each side; a side that does not know takes the other's, as far as it has them."""
    if a.vocab_size is None and b.vocab_size is None:
        smaller = min(a.padded_vocab, b.padded_vocab)
        return smaller, smaller
    found = []
    for said, other in ((a, b), (b, a)):
        known = said.vocab_size
        found.append(min(other.vocab_size or 0, said.padded_vocab) if known is None else known)
    return found[0], found[1]


def _with_unknown(a: Stated, b: Stated) -> tuple[Stated, Stated]:
    """Two directories: names that neither family knows and both have are compared by name."""
    extra = []
    for said in (a, b):
        known = {key for key, _ in said.layout.tensors()}
        patterns = [re.compile(pattern) for pattern in said.ignored]
        extra.append(
            {key for key in said.headers if key not in known and not any(p.fullmatch(key[1]) for p in patterns)}
        )
    both = sorted(extra[0] & extra[1])
    if not both:
        return a, b
    return tuple(_extended(said, both) for said in (a, b))  # type: ignore[return-value]


def _extended(said: Stated, keys: list[Key]) -> Stated:
    added, count = plain_layout({key: said.headers[key] for key in keys}), len(said.layout.rules)
    layout = replace(
        said.layout,
        rules=said.layout.rules + added.rules,
        sizes={**said.layout.sizes, **added.sizes},
        pieces=said.layout.pieces + tuple(replace(piece, rule=piece.rule + count) for piece in added.pieces),
    )
    return replace(said, layout=layout)


def _unlike(key: str, a: Rule, b: Rule, ours: Mapping[str, int], theirs: Mapping[str, int]) -> Unlike | None:
    """How two sides' rules of the same Megatron tensor differ; None where they can be compared."""
    left, right = ([component_axes(rule.target, n) for n in range(rule.target.components)] for rule in (a, b))
    if [sorted(axes) for axes in left] != [sorted(axes) for axes in right]:
        return Unlike(key, a.equation.text, b.equation.text)
    axes = {axis for one in left for axis in one} - {"v"}
    if all(ours[axis] == theirs[axis] for axis in axes):
        return None
    apart = [axis for one in left for axis in one if ours[axis] != theirs[axis]]
    shapes = [str(list(rule.target.shape(sizes))) for rule, sizes in ((a, ours), (b, theirs))]
    if shapes[0] == shapes[1]:  # the same number of elements, otherwise divided
        for at, sizes in enumerate((ours, theirs)):
            shapes[at] += f" ({', '.join(f'{axis_name(axis)}: {sizes[axis]}' for axis in dict.fromkeys(apart))})"
    return Unlike(key, shapes[0], shapes[1])


def _fitted(said: Stated, numbers: Mapping[str, int], rules: Mapping[str, Rule], vocab: int) -> Side:
    """The side's layout over the common rules, without what is not there."""
    sizes = {**said.layout.sizes, "v": vocab}
    full = replace(said.layout, sizes=sizes, allocated={"v": said.padded_vocab} if said.padded_vocab else {})
    held = {key: set(product(*(_range(rule, axis, sizes) for axis in name_axes(rule)))) for key, rule in rules.items()}
    wrong: dict[str, list[Wrong]] = {}
    pieces: list[Piece] = []
    known: set[Key] = set()
    order = {rule.megatron: number for number, rule in enumerate(said.layout.rules)}
    keys = {number: key for key, number in order.items()}
    for piece in full.pieces:
        key, shape = keys[piece.rule], full.shape(piece)
        good: list[Ids] = []
        for ids, tensor in piece.keyed():
            known.add(tensor)
            header = said.headers.get(tensor)
            if header is not None and header.shape == shape and key not in (said.wrong or {}):
                good.append(ids)
                continue
            if header is not None and header.shape != shape:
                wrong.setdefault(key, []).append(Wrong(piece, ids, tensor, shape, header.shape))
            if not piece.replica:
                held[key] -= set(_rule_ids(piece, ids, rules[key], sizes))
        if key in numbers:
            pieces += [replace(part, rule=numbers[key]) for part in _reduced(piece, good)]
    patterns = [re.compile(pattern) for pattern in said.ignored]
    unknown = [key[1] for key in said.headers if key not in known and not any(p.fullmatch(key[1]) for p in patterns)]
    return Side(
        said,
        replace(full, rules=tuple(rules[key] for key in numbers), pieces=tuple(pieces)),
        rules,
        {key: frozenset(ids) for key, ids in held.items()},
        {key: tuple(items) for key, items in wrong.items()},
        tuple(sorted(set(unknown))),
    )


def _range(rule: Rule, axis: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return rule.ids(sizes[LAYER]) if axis == LAYER else tuple(range(sizes[axis]))


def _rule_ids(piece: Piece, ids: Ids, rule: Rule, sizes: Mapping[str, int]) -> list[Ids]:
    """The ids of a rule that one stored tensor has a part of; an axis that is a dim of it counts whole."""
    fixed = {axis.axis: value for axis, value in zip(piece.names, ids, strict=True)}
    return list(product(*((fixed[axis],) if axis in fixed else _range(rule, axis, sizes) for axis in name_axes(rule))))


def _reduced(piece: Piece, good: list[Ids]) -> list[Piece]:
    """A piece without the tensors that are not good."""
    if len(good) == piece.instances:
        return [piece]
    return [
        replace(piece, names=tuple(replace(axis, ids=(value,)) for axis, value in zip(piece.names, ids, strict=True)))
        for ids in good
    ]
