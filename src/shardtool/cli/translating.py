"""translate, and its dry run under `plan`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shardtool.cli.conversions import execute_prepared, explain_prepared, ready
from shardtool.cli.options import (
    DEFAULT_JOBS,
    OUTPUT,
    AllowNan,
    Budget,
    DialectOption,
    Dtype,
    DtypeOption,
    Jobs,
    Json,
    MaybeTarget,
    NoChecksums,
    Overwrite,
    Quiet,
    Recipe,
    ShardSize,
    Source,
    TensorDigests,
    Verbose,
    bytes_of,
    checkpoint,
    workers,
)  # fmt: skip
from shardtool.errors import UsageError
from shardtool.execute.staging import interruptible

# fmt: off
Made = Annotated[Path | None, typer.Argument(metavar="DST", help="The directory to make; not needed with --explain.", show_default=False)]
To = Annotated[str, typer.Option("--to", metavar="FAMILY", help="The architecture to write, by its model_type: llama, qwen2, mistral, ...", rich_help_panel=OUTPUT, show_default=False)]
FoldDtype = Annotated[Dtype, typer.Option("--fold-dtype", help="Dtype of tensors that are computed anew (a scale folded in).", rich_help_panel=OUTPUT)]
Explain = Annotated[bool, typer.Option("--explain", help="Say what happens to every tensor; nothing is written.")]
# fmt: on


def translate(
    src: Source, dst: Made = None, *, to: To, explain: Explain = False,
    dialect: DialectOption = None, dtype: DtypeOption = Dtype.keep, fold_dtype: FoldDtype = Dtype.keep,
    max_shard_size: ShardSize = "5GB",
    no_checksums: NoChecksums = False, tensor_digests: TensorDigests = False, allow_nan: AllowNan = False,
    overwrite: Overwrite = False, jobs: Jobs = DEFAULT_JOBS, memory_budget: Budget = "512MiB", config: Recipe = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Write a Hugging Face checkpoint as another architecture, and say how exact that is."""
    from shardtool.translate import prepare_translate  # noqa: PLC0415 - numpy and the engine are not needed for --help

    source = checkpoint(src)
    if dst is None and not explain:
        raise UsageError("DST is missing", hint="give the directory to make, or --explain to see what would be done")
    size = bytes_of(max_shard_size, "--max-shard-size")
    prepare = partial(
        prepare_translate, source, to, dtype=dtype.value, fold_dtype=fold_dtype.value, max_shard_size=size, dialect=dialect
    )  # fmt: skip
    if explain or dst is None:
        explain_prepared(prepare(), dst, overwrite)
        return
    with interruptible(dst):
        ready(source, dst, overwrite)
        execute_prepared(prepare, dst, overwrite, workers(jobs, memory_budget), no_checksums, tensor_digests, allow_nan)


def plan_translate(
    src: Source, dst: MaybeTarget = None, *, to: To,
    dialect: DialectOption = None, dtype: DtypeOption = Dtype.keep, fold_dtype: FoldDtype = Dtype.keep,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False, jobs: Jobs = DEFAULT_JOBS, memory_budget: Budget = "512MiB", config: Recipe = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """What translate would do; nothing is written."""
    from shardtool.translate import prepare_translate  # noqa: PLC0415 - numpy and the engine are not needed for --help

    size = bytes_of(max_shard_size, "--max-shard-size")
    found = prepare_translate(
        checkpoint(src), to, dtype=dtype.value, fold_dtype=fold_dtype.value, max_shard_size=size, dialect=dialect
    )  # fmt: skip
    explain_prepared(found, dst, overwrite)


COMMANDS: dict[str, Callable[..., None]] = {"translate": translate}
PLANS: dict[str, Callable[..., None]] = {"translate": plan_translate}
