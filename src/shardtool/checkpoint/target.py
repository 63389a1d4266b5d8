"""What is to be written: tensors with their shapes and dtypes, and the files that will hold them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct, field

from shardtool.checkpoint.opened import Header, fold
from shardtool.errors import CheckpointError
from shardtool.formats.stored import Payload, Skeleton
from shardtool.layout.layout import Key, Piece
from shardtool.plan.copies import Plan


class TargetTensor(Struct, frozen=True):
    """A tensor to write."""

    key: Key
    piece: Piece
    shape: tuple[int, ...]
    dtype: str


class Skeletons(Mapping[str, Skeleton]):
    """The skeletons of many files, each made when it is first asked for: a dry run needs their names only."""

    def __init__(self, makers: Mapping[str, Callable[[], Skeleton]]) -> None:
        """`makers` make the skeleton of each file."""
        self._makers = makers
        self._made: dict[str, Skeleton] = {}

    def __getitem__(self, name: str) -> Skeleton:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Places(Mapping[Key, tuple[str, Hashable]]):
    """Where tensors are: their keys, and a function from a key to its file and place there, made when asked for."""

    def __init__(self, keys: Sequence[Key], find: Callable[[Key], tuple[str, Hashable]]) -> None:
        """`find` is asked for `keys` alone."""
        self._keys = keys
        self._find = find

    def __getitem__(self, key: Key) -> tuple[str, Hashable]:
        return self._find(key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


Write = Callable[[bytes], object]


class Target(Struct, frozen=True):
    """Files before their payload. `places` finds a tensor in a skeleton; `last` are files written at the end, in
    order, each made when it is needed and handed over piece by piece: that of a large model takes as long as its plan,
    and is large.
    """

    skeletons: Mapping[str, Skeleton]
    places: Mapping[Key, tuple[str, Hashable]]
    last: Mapping[str, Callable[[Write], object]] = field(default_factory=dict)

    def payload(self, key: Key) -> tuple[str, Payload]:
        """The file of a tensor and its place there."""
        name, inner = self.places[key]
        return name, self.skeletons[name].payload[inner]

    def digest(self) -> str:
        """A hash of every byte of the files that is not payload: names, shapes, dtypes and places among them."""
        found = hashlib.sha256()
        for name, skeleton in self.skeletons.items():
            found.update(f"{name}\0{skeleton.size}\0".encode())
            for offset, part in skeleton.parts:
                found.update(f"{offset}\0{len(part)}\0".encode())
                found.update(part)
        return found.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        sizes = [skeleton.size for skeleton in self.skeletons.values()]
        for make in self.last.values():
            make(lambda piece: sizes.append(len(piece)))
        return sum(sizes)


def target_tensors(plan: Plan, dtypes: Mapping[int, str]) -> list[TargetTensor]:
    """Every tensor of the plan's target in the order of the files; `dtypes` by identity of the piece.

    Input embedding, then layer by layer, then what comes after the layers; by name, whatever the family's table.
    """
    before: list[TargetTensor] = []
    layers: dict[tuple[int, ...], list[TargetTensor]] = defaultdict(list)
    after: list[TargetTensor] = []
    early = ("embedding.", "model.embed", "transformer.wte", "transformer.wpe")
    # the pieces are sorted, and the ids, but not the tensors, which are many more
    for piece in sorted(plan.dst.pieces, key=lambda piece: piece.name):
        shape, dtype = plan.dst.shape(piece), dtypes[id(piece)]
        if piece.names:
            for ids, key in piece.keyed():
                layers[ids].append(TargetTensor(key, piece, shape, dtype))
        else:
            found = before if piece.name.startswith(early) and not piece.replica else after
            found += [TargetTensor(key, piece, shape, dtype) for key in piece.all_keys()]
    return [*before, *(tensor for ids in sorted(layers) for tensor in layers[ids]), *after]


def resolve_dtypes(plan: Plan, headers: Mapping[Key, Header], cast: str | None, where: str = "") -> dict[int, str]:
    """The dtype of every target piece: `cast`, or that of its sources; that of most bytes where it has none (constants).

    Rules that keep their dtype are not cast. CheckpointError where sources of different dtypes meet in one tensor
    and no `cast` says what it shall be.
    """
    of_source = {id(piece): {headers[key].dtype for key in piece.all_keys()} for piece in plan.src.pieces}
    found: dict[int, set[str]] = {id(piece): set() for piece in plan.dst.pieces}
    of_rule: dict[int, set[str]] = defaultdict(set)
    for copy in plan.copies:
        found[id(copy.dst)] |= of_source[id(copy.src)]
        of_rule[copy.dst.rule] |= of_source[id(copy.src)]
    for piece in plan.dst.pieces:  # a shard of nothing but padding has its tensor's dtype
        found[id(piece)] = found[id(piece)] or of_rule[piece.rule] or {_prevailing(headers.values())}
    if cast is not None:
        for piece in plan.dst.pieces:
            if not plan.dst.rules[piece.rule].keep_dtype:
                found[id(piece)] = {cast}
    if any(len(dtypes) > 1 for dtypes in found.values()):
        raise _mixed(plan, headers, {key for key, dtypes in found.items() if len(dtypes) > 1}, where)
    return {key: next(iter(dtypes)) for key, dtypes in found.items()}


def _mixed(plan: Plan, headers: Mapping[Key, Header], mixed: set[int], where: str) -> CheckpointError:
    """The source tensors that keep a target tensor from having one dtype: those that have another than most bytes."""
    keys = {key: None for copy in plan.copies if id(copy.dst) in mixed for key in copy.src.all_keys()}
    most = _prevailing(headers[key] for key in keys)
    odd = {key: headers[key].dtype for key in keys if headers[key].dtype != most}
    lines = fold(f"{name}{' in ' + file if file else ''}: {dtype}" for (file, name, _), dtype in odd.items())
    return CheckpointError(
        "tensors of different dtypes would be parts of one tensor",
        where=where,
        expected=f"{most}, as the others beside them have it",
        found=", ".join(sorted(set(odd.values()))),
        details=tuple(lines[:20]),
        hint="choose the dtype with --dtype bf16, fp16 or fp32",
    )


def _prevailing(headers: Iterable[Header]) -> str:
    """The dtype of most bytes."""
    sizes: Counter[str] = Counter()
    for header in headers:
        sizes[header.dtype] += header.nbytes
    return sizes.most_common(1)[0][0]
