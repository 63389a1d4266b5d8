"""`verify`: is the one checkpoint the same model as the other? Three levels, each with its own blindness."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from shardtool.checkpoint.constants import check_constants
from shardtool.checkpoint.huggingface import HuggingFace, open_huggingface
from shardtool.checkpoint.megatron import Megatron, read_megatron
from shardtool.checkpoint.opened import Opened, fold
from shardtool.errors import CheckpointError, UsageError
from shardtool.execute import engine, finite
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import standard
from shardtool.families.dialects import same_components
from shardtool.families.family import TRAINING_ONLY, describe_differences
from shardtool.formats.detect import detect
from shardtool.layout.rules import Rule
from shardtool.plan.plan import plan, replicas
from shardtool.verify.logits import compare_logits
from shardtool.verify.report import Level, VerifyReport
from shardtool.verify.sides import HuggingFaceSide, MegatronSide, Side

LevelName = Literal["accounting", "exact", "logits"]
LEVELS: tuple[LevelName, ...] = ("accounting", "exact", "logits")


class LogitsOptions(Struct, frozen=True):
    """How the logits level runs; see verify.logits.compare_logits."""

    dtype: Literal["fp32", "bf16", "fp16", "native"] = "fp32"
    threshold: float | None = None
    seed: int = 0
    max_tokens: int | None = None


def open_side(path: Path, *, megatron: bool = True) -> HuggingFace | Megatron:
    """A checkpoint of either kind, its headers read; CheckpointError where it is none.

    A Hugging Face directory is as Megatron sees it, without `megatron` as its family has it.
    """
    if _is_huggingface(path):
        return open_huggingface(path, megatron=megatron)
    return read_megatron(path)


def _is_huggingface(path: Path) -> bool:
    return detect(path).kind.startswith("hf_")


def verify(
    a: Path,
    b: Path,
    *,
    levels: Collection[LevelName] = LEVELS,
    options: LogitsOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare two checkpoints, Hugging Face or Megatron each; `a` is the reference.

    What is wrong with a checkpoint is a problem of a level in the report. Raises UsageError where the request makes
    no sense, CheckpointError where a directory is no checkpoint at all.
    """
    say = progress or (lambda _: None)
    megatron = not (_is_huggingface(a) and _is_huggingface(b))
    opened = [open_side(path, megatron=megatron) for path in (a, b)]
    made: list[Level] = []
    pair: tuple[Opened, Opened] | None = None
    if {"accounting", "exact"} & set(levels):
        say("accounting: reading headers")
        level, pair = _accounting(opened[0], opened[1])
        if "accounting" in levels:
            made.append(level)
        elif not level.passed:
            made.append(replace(level, name="exact"))
    if "exact" in levels and pair is not None:
        say("exact: comparing bits")
        made.append(_exact(*pair))
    elif "exact" in levels and not any(level.name == "exact" for level in made):
        made.append(Level("exact", None, lines=("the accounting does not fit, so there is nothing to compare with",)))
    if "logits" in levels:
        say("logits: running both models")
        made.append(_logits(opened[0], opened[1], options or LogitsOptions()))
    return VerifyReport(str(a), str(b), tuple(made))


def _architecture(side: HuggingFace | Megatron) -> Architecture:
    return side.opened.architecture if isinstance(side, HuggingFace) else side.architecture


def _accounting(a: HuggingFace | Megatron, b: HuggingFace | Megatron) -> tuple[Level, tuple[Opened, Opened] | None]:
    """Is every element of the one in the other, and do the configs describe the same function?"""
    ours, theirs = _architecture(a), _architecture(b)
    ignore = {"family", "mtp_layers", *TRAINING_ONLY}
    if not (isinstance(a, HuggingFace) and isinstance(b, HuggingFace)):
        ignore.add("zero_out_bias")
        ignore.add("folded")  # of the Hugging Face side alone; the other levels see whether the weights contain it
        if ours.rope is not None:
            ignore.add("max_positions")
    if any(isinstance(side, Megatron) and not side.args.get("vocab_size") for side in (a, b)):
        ignore.add("vocab_size")
    problems = [f"config: {line}" for line in describe_differences(ours, theirs, frozenset(ignore))]
    try:
        pair = _open_both(a, b)
        made = plan(pair[0].layout, pair[1].layout)
    except (CheckpointError, UsageError) as error:
        return Level("accounting", False, problems=(*problems, str(error))), None
    numbers = {
        "tensors_a": len(pair[0].headers),
        "tensors_b": len(pair[1].headers),
        "bytes_a": pair[0].nbytes,
        "bytes_b": pair[1].nbytes,
        "plan_digest": made.digest(),
    }
    lines = (
        f"{numbers['tensors_a']} tensors, {numbers['bytes_a']:,} bytes in a",
        f"{numbers['tensors_b']} tensors, {numbers['bytes_b']:,} bytes in b",
    )
    return Level("accounting", not problems, numbers, lines, tuple(problems)), pair


def _open_both(a: HuggingFace | Megatron, b: HuggingFace | Megatron) -> tuple[Opened, Opened]:
    """Both sides with the same rules and the same vocabulary: that of the Hugging Face side where there is one."""
    rules: tuple[Rule, ...]
    given = a if isinstance(a, HuggingFace) else b if isinstance(b, HuggingFace) else None
    if given is not None:
        rules, vocab = given.opened.layout.rules, given.opened.architecture.vocab_size
    else:
        assert isinstance(a, Megatron) and isinstance(b, Megatron)
        rules = standard(a.architecture)
        vocab = min(a.padded_vocab, b.padded_vocab)
        if a.args.get("vocab_size") and b.args.get("vocab_size"):
            vocab = min(a.architecture.vocab_size, b.architecture.vocab_size)
    found = []
    for side in (a, b):
        if isinstance(side, Megatron):
            found.append(side.open(rules, vocab))
            if given is not None:
                check_constants(given.opened)
        else:
            if not same_components(side.opened.layout.rules, rules):
                raise UsageError(
                    f"a {_architecture(b).family} and a {_architecture(a).family} directory have different tables",
                    hint="compare their logits: --level logits",
                )
            found.append(side.opened)
    return found[0], found[1]


def _exact(a: Opened, b: Opened) -> Level:
    """Every bit that the plan would write from a, compared with what b holds; replicas on both sides as well.

    A Hugging Face directory is converted and compared with Megatron's, not the other way round: values that are folded or
    normalised on the way in have no exact way back.
    """
    if b.layout.side == 0:
        a, b = b, a
    made = plan(a.layout, b.layout)
    try:
        compared, differences = engine.compare(made, a.locate, b.locate)
        for side in (a, b):
            if (twins := replicas(side.layout)) is not None and side is a:
                more, found = engine.compare(twins, side.locate, side.locate)
                compared, differences = compared + more, differences + found
    except CheckpointError as error:
        return Level("exact", False, problems=(str(error),))
    problems = fold(
        f"{item.key[1]}{' in ' + item.key[0] if item.key[0] else ''}: "
        f"{item.elements} of {item.total} elements differ, the first is number {item.first}"
        for item in differences
    )
    notes = [f"note: {item}" for side in (a, b) for item in finite.scan(side.headers, side.locate)]
    numbers = {"elements": compared, "differing_tensors": len(differences), "not_finite": len(notes)}
    if not compared:
        problems.append("nothing was compared")
    return Level("exact", not problems, numbers, (f"{compared:,} elements compared", *notes[:20]), tuple(problems[:40]))


def _logits(a: HuggingFace | Megatron, b: HuggingFace | Megatron, options: LogitsOptions) -> Level:
    report = compare_logits(
        _side(a, b),
        _side(b, a),
        dtype=options.dtype,
        threshold=options.threshold,
        seed=options.seed,
        max_tokens=options.max_tokens,
    )
    return report.level()


def _side(side: HuggingFace | Megatron, other: HuggingFace | Megatron) -> Side:
    if isinstance(side, HuggingFace):
        return HuggingFaceSide(side.opened.path)
    a = side.architecture
    if not side.args.get("vocab_size"):  # only the other side knows where the padding begins
        a = replace(a, vocab_size=min(_architecture(other).vocab_size, side.padded_vocab))
    return MegatronSide(side.save.directory, a, side.mesh)
