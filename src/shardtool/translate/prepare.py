"""A translation prepared: the verdict, the plan, and the files to be written. Nothing is written here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from shardtool.checkpoint.companions import companions
from shardtool.checkpoint.constants import broken_constants
from shardtool.checkpoint.huggingface import config_bytes, huggingface_target, open_model, read_config, understood
from shardtool.checkpoint.opened import Opened
from shardtool.checkpoint.target import resolve_dtypes, target_tensors
from shardtool.conversion import Prepared
from shardtool.convert import DTYPES
from shardtool.errors import ShardtoolError, unknown_value
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import LINEAR_OUT, LINEAR_QKV, OUTPUT, axis_sizes
from shardtool.families.family import Config, Family
from shardtool.families.refused import REFUSED
from shardtool.families.registry import FAMILIES, family_of
from shardtool.layout.codecs import describe
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import Layout, Piece
from shardtool.layout.rules import Rule
from shardtool.plan.copies import Plan
from shardtool.plan.plan import plan
from shardtool.translate.join import join, scaled_queries
from shardtool.translate.match import DiffersError, Match, biases, match
from shardtool.translate.norms import with_biases, without_layer_norms
from shardtool.translate.rotary import frequencies, partial_as_whole, separate_scaling
from shardtool.translate.verdict import Step, UntranslatableError, Verdict, worst

ROUTERS = (
    "the two families' routers round in different places: in low precision a token that two experts are about equal for "
    "may get the other one"
)
# what config.json says of the tokens, whatever the architecture
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")


class _Source(Struct, frozen=True):
    """A config.json as translation reads it: a rope scaling that only transformers interprets stands apart."""

    config: Config
    family: Family
    architecture: Architecture
    scaling: Mapping[str, Any] | None
    rules: tuple[Rule, ...]  # in the spelling of its files, where there are files
    plain: Architecture | None = None  # the same without attention biases, where all of them are zeros


class _Decided(Struct, frozen=True):
    """What the configs alone decide."""

    source: _Source
    target: Family
    found: Match
    plan: Plan
    verdict: Verdict


def verdict_of(config: Config, to: str) -> Verdict:
    """The verdict on a config.json alone: what must be zero in the weights is taken to be.

    An impossible translation is a verdict here, no error.
    """
    try:
        return _decide(_read(config, _target(to)), _target(to)).verdict
    except UntranslatableError as error:
        return error.verdict


def prepare_translate(
    src: Path,
    to: str,
    *,
    dtype: str = "keep",
    fold_dtype: str = "keep",
    max_shard_size: int = 5 * 10**9,
    dialect: str | None = None,
) -> Prepared:
    """One Hugging Face directory as another architecture (`to` is its model_type).

    `fold_dtype` is the dtype of tensors whose values are computed anew (a scale folded in); `dialect` the target's names on
    disk, where it has several (None: those of its table). Raises UntranslatableError with
    the verdict where the target cannot compute what the source does, UsageError and CheckpointError as every conversion.
    """
    target = _target(to)
    spoken = target.speaking(dialect)
    for name, value in (("--dtype", dtype), ("--fold-dtype", fold_dtype)):
        if value not in ("keep", *DTYPES):
            raise unknown_value(name, value, ("keep", *DTYPES))
    config = read_config(src)
    try:
        source = understood(lambda: _read(config, target), src)
        prepared = _prepare(src, source, spoken, dtype, fold_dtype, max_shard_size)
    except UntranslatableError as error:
        raise UntranslatableError(error.verdict, str(src), _others(config, target)) from error
    return replace(prepared, options={**prepared.options, "dialect": dialect}) if dialect else prepared


def _prepare(src: Path, source: _Source, target: Family, dtype: str, fold_dtype: str, max_shard_size: int) -> Prepared:
    opened = open_model(src, source.config, source.family, source.architecture).opened
    # MTP layers that are not on disk are not there
    source = replace(
        source, architecture=opened.architecture, rules=opened.layout.rules, plain=_without_zero_biases(opened)
    )
    decided = _decide(source, target)
    if source.architecture.norm != decided.found.target.norm:
        opened = with_biases(source.rules, opened)
    opened = replace(opened, layout=_as_stored(decided.plan.src, opened))
    if broken := broken_constants(opened):
        reasons = tuple(f"{line}, and the target has no such tensor" for line in broken)
        raise UntranslatableError(replace(decided.verdict, level="impossible", steps=(), caveats=(), reasons=reasons))
    made = plan(opened.layout, decided.plan.dst)
    dtypes = _folded(resolve_dtypes(made, opened.headers, DTYPES.get(dtype), str(src)), made, DTYPES.get(fold_dtype))
    tensors = target_tensors(made, dtypes)
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += prod(tensor.shape)
    written = config_bytes(_config(source, decided.found, target, sizes.most_common(1)[0][0]))
    companions(src, written)  # refuse now what could not be copied at the end
    return Prepared(
        "translate", opened, made, huggingface_target(tensors, max_shard_size), decided.found.target, "",
        {"config.json": written}, src, dtypes=dtypes,
        options={"to": target.model_type, "dtype": dtype, "fold_dtype": fold_dtype, "max_shard_size": max_shard_size},
        verdict=decided.verdict,
    )  # fmt: skip


def _others(config: Config, target: Family) -> str:
    """What else the source can be."""
    found = []
    for name, family in FAMILIES.items():
        try:
            source = _read(config, family)
            other = match(source.architecture, family, source.scaling).target
        except (ShardtoolError, DiffersError):
            continue
        if family not in (target, source.family) and biases(other) >= biases(source.architecture):
            found.append(name)
    if not found:
        return "no other known architecture computes what it does"
    return f"what it may be: --to {', '.join(found)}"


def _without_zero_biases(opened: Opened) -> Architecture | None:
    """The architecture without attention biases where all that the source has are zeros, as another family leaves them."""
    a, layout = opened.architecture, opened.layout
    if a.linear_bias or not (a.qkv_bias or a.out_bias):
        return None
    keys = (f"{LINEAR_QKV}.bias", f"{LINEAR_OUT}.bias")
    stored = (piece for piece in layout.pieces if layout.rules[piece.rule].megatron.endswith(keys))
    zeros = replace(layout, pieces=tuple(replace(piece, constant=0.0) for piece in stored))
    if broken_constants(replace(opened, layout=zeros)):
        return None
    return replace(a, qkv_bias=False, out_bias=False)


def _as_stored(layout: Layout, opened: Opened) -> Layout:
    """The layout with those optional copies alone that are on disk: they are compared, not trusted."""
    copies = {name for rule in layout.rules for name in rule.copies}
    pieces = (p for p in layout.pieces if p.name not in copies or any(key in opened.headers for key in p.all_keys()))
    return replace(layout, pieces=tuple(pieces))


def _target(to: str) -> Family:
    family = FAMILIES.get(to)
    if family is None:
        raise unknown_value("--to", to, sorted(FAMILIES))
    return family


def _read(config: Config, target: Family) -> _Source:
    name = str(config.get("model_type"))
    if name not in FAMILIES and (reason := REFUSED.get(name)):
        raise UntranslatableError(Verdict(name, target.model_type, "impossible", reasons=(reason,)))
    family = family_of(config)
    plain, scaling = separate_scaling(config, family)
    a = family.read_config(plain, megatron=False)
    return _Source(plain, family, a, scaling, family.rules(a))


def _decide(source: _Source, target: Family) -> _Decided:
    a = source.architecture
    try:
        found = match(source.plain or a, target, source.scaling)
        rules = source.rules
        if a.norm != found.target.norm:
            rules = without_layer_norms(rules)
        if a.softmax_scale is not None and found.target.softmax_scale is None:
            rules = scaled_queries(rules, a.softmax_scale * a.head_dim**0.5)
        factor = 1.0 if a.rope is None else frequencies(a.rope, a.head_dim, source.scaling).attention
        joined = join(a, rules, found.target, target.rules(found.target), axis_sizes(a), factor)
    except DiffersError as error:
        verdict = Verdict(source.family.model_type, target.model_type, "impossible", reasons=error.reasons)
        raise UntranslatableError(verdict) from error
    made = plan(joined.src, joined.dst)
    return _Decided(source, target, found, made, _verdict(source, found, made, target))


def _verdict(source: _Source, found: Match, made: Plan, target: Family) -> Verdict:
    steps = [*found.steps, *_folds(made), *_constants(made), *_head(source, found, target, made)]
    a = source.architecture
    if a.moe is not None and source.family.model_type != target.model_type:
        steps.append(Step(ROUTERS, "exact"))
    limit = source.family.limit(source.config)
    if limit and source.family.model_type != target.model_type:
        what = f"sequences of at most {a.max_positions} tokens: {limit}; max_position_embeddings says so"
        steps.append(Step(what, "conditional"))
    caveats = []
    if any("longrope" in step.what for step in found.steps):
        caveats.append("engine-dependent: transformers 4 and 5 compute it so, other engines must be checked")
    if any(piece.constant is not None and piece.name.endswith("o_proj.bias") for piece in made.dst.pieces):
        caveats.append("engine-dependent: old versions of vLLM, SGLang, llama.cpp and MLC ignored attention_bias")
    before = sum(_elements(made.src, p) for p in huggingface_layout(source.rules, axis_sizes(a)).pieces)
    after = sum(_elements(made.dst, piece) for piece in made.dst.pieces)
    return Verdict(
        source.family.model_type, target.model_type, worst(tuple(steps)), tuple(steps), caveats=tuple(caveats),
        parameters=after - before,
    )  # fmt: skip


def _folds(made: Plan) -> list[Step]:
    """Values that are computed anew."""
    seen: dict[tuple[str, str], None] = {}
    for copy in made.copies:
        if copy.changed:
            pieces = zip((copy.src, copy.dst), copy.codecs, strict=True)
            parts = [f"{piece.name}: {describe(codec)}" for piece, codec in pieces if codec is not None]
            seen[copy.dst.name, "; ".join(parts)] = None
    return [Step(f"{name} is computed in fp32 and rounded once ({how})", "exact") for name, how in seen]


def _constants(made: Plan) -> list[Step]:
    """Tensors that only one of the two has."""
    written = [
        Step(f"{piece.name} = {piece.constant:g}", parameters=_elements(made.dst, piece))
        for piece in made.dst.pieces
        if piece.constant is not None
    ]
    left = [
        Step(
            f"{piece.name} is {piece.constant:g} everywhere (checked): left out", parameters=-_elements(made.src, piece)
        )
        for piece in made.src.pieces
        if piece.constant is not None
    ]
    return written + left


def _head(source: _Source, found: Match, target: Family, made: Plan) -> list[Step]:
    if not _one_tensor(source.architecture) or _one_tensor(found.target):
        return []
    heads = {rule.hf[0] for rule in target.rules(found.target) if rule.megatron == OUTPUT}
    piece = next(piece for piece in made.dst.pieces if piece.name in heads)
    return [Step(f"untied: {piece.name} becomes a tensor of its own", parameters=_elements(made.dst, piece))]


def _one_tensor(a: Architecture) -> bool:
    """Whether embedding and head are one tensor on disk."""
    return a.tied or (a.folded is not None and a.folded.tied)


def _elements(layout: Layout, piece: Piece) -> int:
    return prod(layout.shape(piece)) * piece.instances


def _folded(dtypes: dict[int, str], made: Plan, wide: str | None) -> dict[int, str]:
    """The dtypes with those of tensors that are computed anew replaced."""
    if wide is None:
        return dtypes
    computed = {id(copy.dst) for copy in made.copies if copy.changed}
    return {piece: wide if piece in computed else dtype for piece, dtype in dtypes.items()}


def _config(source: _Source, found: Match, target: Family, dtype: str) -> dict[str, Any]:
    """The config.json of the result, in the dialect that transformers 4 and 5 both read."""
    a, b = source.architecture, found.target
    config = target.config(b, dtype)
    config |= {key: source.config[key] for key in CARRIED if key in source.config}
    scaling = source.scaling
    if a.rope is not None and b.rope is not None and a.rope.fraction != b.rope.fraction:
        scaling = partial_as_whole(a.rope, a.head_dim, a.max_positions, scaling)
    if scaling is not None:
        config["rope_scaling"] = dict(scaling)
        if "original_max_position_embeddings" in scaling and scaling["rope_type"] == "longrope":
            # transformers 4 takes it from here, and 5 gives it precedence
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return config
