"""inspect, diff, verify, args, demo."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from shardtool.cli import console
from shardtool.cli.options import DEFAULT_JOBS, Json, Pp, Quiet, Source, Tp, Verbose, checkpoint
from shardtool.errors import CheckpointError, UsageError, unknown_value
from shardtool.layout.mesh import Mesh


class Precision(StrEnum):
    """The dtype in which both models compute."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    native = "native"


def inspect(
    ckpt: Source,
    values: Annotated[bool, typer.Option("--values", help="Also read every weight: are there NaN or Inf?")] = False,
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="With --values: NaN and Inf are told, and are no error.")] = False,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """What is in this directory: format, layout, layers, dtypes, bytes, what is missing."""
    from shardtool.inspect import inspect_checkpoint  # noqa: PLC0415 - only this command needs it

    report = inspect_checkpoint(checkpoint(ckpt), values=values, allow_nan=allow_nan)
    console.result(report.as_dict(), report.lines(verbose=verbose))
    if report.problem is not None:
        raise report.problem


def verify(
    a: Annotated[str | None, typer.Argument(metavar="A", help="The reference.", show_default=False)] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help="What is to be the same model.", show_default=False)] = None,
    checksums: Annotated[Path | None, typer.Option("--checksums", metavar="DIR", help="Instead of comparing models: is every file of DIR as shardtool wrote it (its shardtool.json)?", show_default=False)] = None,
    level: Annotated[list[str] | None, typer.Option("--level", help="accounting, exact or logits; may be repeated. [default: all]", show_default=False)] = None,
    dtype: Annotated[Precision, typer.Option("--dtype", help="The dtype in which both models compute.")] = Precision.fp32,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Largest max |delta logit| / std(logits). [default: 1e-4 in fp32, measured rounding else]", show_default=False)] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random-token prompts.")] = 0,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest prompt.", show_default=False)] = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Is it the same model? Exit 0 when it is, 1 when it is not."""
    if checksums is not None:
        _verify_checksums(checksums, a)
        return
    if a is None or b is None:
        raise UsageError("verify needs A and B, or --checksums DIR", hint="shardtool verify --help")
    from shardtool.verify import judge  # noqa: PLC0415 - heavy

    wanted = level or list(judge.LEVELS)
    if unknown := [name for name in wanted if name not in judge.LEVELS]:
        raise unknown_value("--level", ", ".join(unknown), judge.LEVELS)
    options = judge.LogitsOptions(dtype.value, threshold, seed, max_tokens)
    chosen = [name for name in judge.LEVELS if name in wanted]
    report = judge.verify(checkpoint(a), checkpoint(b), levels=chosen, options=options, progress=console.say)
    console.result(report.as_dict(), report.lines())
    raise typer.Exit(report.exit_code)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.", show_default=False)],
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Are they the same tensors? Across formats and layouts; what differs is named. Exit 0 the same, 1 different."""
    from shardtool.diff.compare import compared_bytes, diff  # noqa: PLC0415 - only this command needs it

    ours, theirs = checkpoint(a), checkpoint(b)
    with console.progress(compared_bytes(theirs), "diff") as progress:
        report = diff(ours, theirs, say=console.say if verbose else None, progress=progress)
    console.result(report.as_dict(), report.lines())
    raise typer.Exit(report.exit_code)


def _verify_checksums(directory: Path, other: str | None) -> None:
    from shardtool.manifest import check  # noqa: PLC0415 - only this option needs it

    if other is not None:
        raise UsageError(
            "--checksums takes one directory, and no A and B", found=other, hint="shardtool verify --checksums DIR"
        )
    findings = check(directory, threads=DEFAULT_JOBS)
    console.result(findings.as_dict(), findings.lines())
    raise typer.Exit(0 if findings.same else 1)


def args(
    ckpt: Source,
    every: Annotated[bool, typer.Option("--all", help="Also the flags that --use-checkpoint-args reads back.")] = False,
    tp: Tp = 1, pp: Pp = 1, json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """The Megatron-LM launch flags that this model needs."""
    from shardtool.checkpoint.megatron import Megatron  # noqa: PLC0415
    from shardtool.convert import flags_of  # noqa: PLC0415
    from shardtool.families.exactness import inexact  # noqa: PLC0415
    from shardtool.families.launch_flags import without_flag  # noqa: PLC0415
    from shardtool.verify.judge import open_side  # noqa: PLC0415

    side = open_side(checkpoint(ckpt))
    if reason := inexact(side.architecture if isinstance(side, Megatron) else side.opened.architecture):
        console.say(f"note: megatron-core computes another function from these weights: {reason}")
    megatron = isinstance(side, Megatron)
    flags = flags_of(side, Mesh(tp, pp), stored_only=megatron and not every)
    lines = ["--use-checkpoint-args", *flags] if megatron and not every else flags
    needed = without_flag(side.architecture if isinstance(side, Megatron) else side.opened.architecture)
    data: dict[str, Any] = {"checkpoint": ckpt, "flags": lines, "without_flag": list(needed)}
    for line in needed:
        console.say(f"note: {line}")
    console.result(data, [" \\\n".join(lines)])


def demo(
    work: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Where to work. [default: a temporary directory]", show_default=False)] = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Build a tiny model and run the whole story on it."""
    from shardtool.demo import run_demo  # noqa: PLC0415 - heavy

    report = run_demo(work, console.say)
    console.result(
        report,
        [line for step in report["steps"] for line in (f"$ {step['command']}", *step["lines"], "")]
        + [report["verdict"]],
    )
    if not report["same"]:
        raise CheckpointError(
            "the demo's model did not come back as it was",
            details=(str(report["verdict"]),),
            hint="report this: the demo runs on a model of its own",
        )


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "diff": diff,
    "verify": verify,
    "args": args,
    "demo": demo,
}
