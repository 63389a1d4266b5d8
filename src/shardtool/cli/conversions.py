"""hf2megatron, megatron2hf, reshard, and their dry runs under `plan`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardtool.cli import console
from shardtool.cli.options import (
    DEFAULT_JOBS,
    AccountEmbedding,
    AccountLoss,
    AllowNan,
    Budget,
    DialectOption,
    Divisible,
    Dtype,
    DtypeOption,
    Ep,
    Etp,
    Experts,
    ExpertsOption,
    First,
    Format,
    FormatOption,
    Hf,
    Inexact,
    Jobs,
    Json,
    Last,
    MaybeDivisible,
    MaybeExperts,
    MaybeFormat,
    MaybeMtp,
    MaybeSpec,
    MaybeTarget,
    MtpName,
    MtpOption,
    NoChecksums,
    Overwrite,
    Pad,
    PipelineLayout,
    Pp,
    Quiet,
    Recipe,
    Reflink,
    ShardSize,
    Source,
    Spec,
    SpecOption,
    Target,
    TensorDigests,
    Tp,
    Verbose,
    VocabPad,
    Vpp,
    bytes_of,
    checkpoint,
    mesh,
    workers,
)  # fmt: skip
from shardtool.errors import UsageError
from shardtool.execute.launcher import place
from shardtool.execute.staging import check_destination, interruptible, recover

if TYPE_CHECKING:
    from shardtool import convert
    from shardtool.layout.mesh import Mesh

DIVISIBLE_BY = 128
THREAD_STACK = 1 << 20  # bytes; the system's 8 MiB for each of our threads count where data is limited (RLIMIT_DATA)


def hf2megatron(
    src: Source, dst: Target,
    tp: Tp = 1, pp: Pp = 1, vpp: Vpp = 1, ep: Ep = 1, etp: Etp = None,
    first_stage_layers: First = None, last_stage_layers: Last = None, pipeline_layout: PipelineLayout = None,
    account_for_embedding: AccountEmbedding = False, account_for_loss: AccountLoss = False,
    format: FormatOption = Format.torch_dist, spec: SpecOption = Spec.te,
    experts: ExpertsOption = Experts.grouped, mtp_name: MtpOption = MtpName.mtp_model_layer, dtype: DtypeOption = Dtype.keep,
    vocab_divisible_by: Divisible = DIVISIBLE_BY, vocab_pad: Pad = VocabPad.zeros, allow_inexact: Inexact = False,
    reflink: Reflink = False, no_checksums: NoChecksums = False, tensor_digests: TensorDigests = False, overwrite: Overwrite = False, allow_nan: AllowNan = False, jobs: Jobs = DEFAULT_JOBS,
    memory_budget: Budget = "512MiB", config: Recipe = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Convert a Hugging Face checkpoint to Megatron."""
    from shardtool import convert  # noqa: PLC0415 - numpy and the engine are not needed for --help

    parallel = mesh(
        tp, pp, vpp, ep, etp, first_stage_layers, last_stage_layers, pipeline_layout, account_for_embedding, account_for_loss
    )  # fmt: skip
    source = checkpoint(src)
    with interruptible(dst):
        ready(source, dst, overwrite)
        options = _options(
            parallel,
            format,
            spec,
            experts,
            mtp_name,
            dtype,
            vocab_divisible_by,
            vocab_pad,
            allow_inexact,
            reflink=reflink,
        )
        prepare = partial(convert.prepare_hf2megatron, source, options)
        execute_prepared(prepare, dst, overwrite, workers(jobs, memory_budget), no_checksums, tensor_digests, allow_nan)


def megatron2hf(
    src: Source, dst: Target, hf: Hf = None, dialect: DialectOption = None, dtype: DtypeOption = Dtype.keep,
    max_shard_size: ShardSize = "5GB",
    reflink: Reflink = False, no_checksums: NoChecksums = False, tensor_digests: TensorDigests = False, overwrite: Overwrite = False, allow_nan: AllowNan = False,
    jobs: Jobs = DEFAULT_JOBS, memory_budget: Budget = "512MiB", config: Recipe = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Convert a Megatron checkpoint to Hugging Face."""
    from shardtool import convert  # noqa: PLC0415 - numpy and the engine are not needed for --help

    source = checkpoint(src)
    with interruptible(dst):
        ready(source, dst, overwrite)
        size = bytes_of(max_shard_size, "--max-shard-size")
        prepare = partial(
            convert.prepare_megatron2hf, source, hf, dtype=dtype.value, max_shard_size=size, dialect=dialect, reflink=reflink
        )  # fmt: skip
        execute_prepared(prepare, dst, overwrite, workers(jobs, memory_budget), no_checksums, tensor_digests, allow_nan)


def reshard(
    src: Source, dst: Target,
    tp: Tp = 1, pp: Pp = 1, vpp: Vpp = 1, ep: Ep = 1, etp: Etp = None,
    first_stage_layers: First = None, last_stage_layers: Last = None, pipeline_layout: PipelineLayout = None,
    account_for_embedding: AccountEmbedding = False, account_for_loss: AccountLoss = False,
    format: MaybeFormat = None, spec: MaybeSpec = None,
    experts: MaybeExperts = None, mtp_name: MaybeMtp = None, dtype: DtypeOption = Dtype.keep,
    vocab_divisible_by: MaybeDivisible = None, vocab_pad: Pad = VocabPad.zeros, reflink: Reflink = False, no_checksums: NoChecksums = False,
    tensor_digests: TensorDigests = False, overwrite: Overwrite = False, allow_nan: AllowNan = False, jobs: Jobs = DEFAULT_JOBS,
    memory_budget: Budget = "512MiB", config: Recipe = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Write a Megatron checkpoint in another parallel layout or format."""
    from shardtool import convert  # noqa: PLC0415 - numpy and the engine are not needed for --help

    parallel = mesh(
        tp, pp, vpp, ep, etp, first_stage_layers, last_stage_layers, pipeline_layout, account_for_embedding, account_for_loss
    )  # fmt: skip
    source = checkpoint(src)
    with interruptible(dst):
        ready(source, dst, overwrite)
        options = _options(
            parallel, format, spec, experts, mtp_name, dtype, vocab_divisible_by, vocab_pad, reflink=reflink
        )
        prepare = partial(convert.prepare_reshard, source, options)
        execute_prepared(prepare, dst, overwrite, workers(jobs, memory_budget), no_checksums, tensor_digests, allow_nan)


def plan_hf2megatron(
    src: Source, dst: MaybeTarget = None,
    tp: Tp = 1, pp: Pp = 1, vpp: Vpp = 1, ep: Ep = 1, etp: Etp = None,
    first_stage_layers: First = None, last_stage_layers: Last = None, pipeline_layout: PipelineLayout = None,
    account_for_embedding: AccountEmbedding = False, account_for_loss: AccountLoss = False,
    format: FormatOption = Format.torch_dist, spec: SpecOption = Spec.te,
    experts: ExpertsOption = Experts.grouped, mtp_name: MtpOption = MtpName.mtp_model_layer, dtype: DtypeOption = Dtype.keep,
    vocab_divisible_by: Divisible = DIVISIBLE_BY, vocab_pad: Pad = VocabPad.zeros, allow_inexact: Inexact = False,
    reflink: Reflink = False, no_checksums: NoChecksums = False, tensor_digests: TensorDigests = False, overwrite: Overwrite = False, allow_nan: AllowNan = False, jobs: Jobs = DEFAULT_JOBS,
    memory_budget: Budget = "512MiB", config: Recipe = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """What hf2megatron would do; nothing is written."""
    from shardtool import convert  # noqa: PLC0415 - numpy and the engine are not needed for --help

    parallel = mesh(
        tp, pp, vpp, ep, etp, first_stage_layers, last_stage_layers, pipeline_layout, account_for_embedding, account_for_loss
    )  # fmt: skip
    source = checkpoint(src)
    options = _options(
        parallel, format, spec, experts, mtp_name, dtype, vocab_divisible_by, vocab_pad, allow_inexact, reflink=reflink
    )
    explain_prepared(convert.prepare_hf2megatron(source, options), dst, overwrite)


def plan_megatron2hf(
    src: Source, dst: MaybeTarget = None, hf: Hf = None, dialect: DialectOption = None, dtype: DtypeOption = Dtype.keep,
    max_shard_size: ShardSize = "5GB",
    reflink: Reflink = False, no_checksums: NoChecksums = False, tensor_digests: TensorDigests = False, overwrite: Overwrite = False, allow_nan: AllowNan = False,
    jobs: Jobs = DEFAULT_JOBS, memory_budget: Budget = "512MiB", config: Recipe = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """What megatron2hf would do; nothing is written."""
    from shardtool import convert  # noqa: PLC0415 - numpy and the engine are not needed for --help

    size = bytes_of(max_shard_size, "--max-shard-size")
    source = checkpoint(src)
    found = convert.prepare_megatron2hf(
        source, hf, dtype=dtype.value, max_shard_size=size, dialect=dialect, reflink=reflink
    )
    explain_prepared(found, dst, overwrite)


def plan_reshard(
    src: Source, dst: MaybeTarget = None,
    tp: Tp = 1, pp: Pp = 1, vpp: Vpp = 1, ep: Ep = 1, etp: Etp = None,
    first_stage_layers: First = None, last_stage_layers: Last = None, pipeline_layout: PipelineLayout = None,
    account_for_embedding: AccountEmbedding = False, account_for_loss: AccountLoss = False,
    format: MaybeFormat = None, spec: MaybeSpec = None,
    experts: MaybeExperts = None, mtp_name: MaybeMtp = None, dtype: DtypeOption = Dtype.keep,
    vocab_divisible_by: MaybeDivisible = None, vocab_pad: Pad = VocabPad.zeros, reflink: Reflink = False, no_checksums: NoChecksums = False,
    tensor_digests: TensorDigests = False, overwrite: Overwrite = False, allow_nan: AllowNan = False, jobs: Jobs = DEFAULT_JOBS,
    memory_budget: Budget = "512MiB", config: Recipe = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """What reshard would do; nothing is written."""
    from shardtool import convert  # noqa: PLC0415 - numpy and the engine are not needed for --help

    parallel = mesh(
        tp, pp, vpp, ep, etp, first_stage_layers, last_stage_layers, pipeline_layout, account_for_embedding, account_for_loss
    )  # fmt: skip
    source = checkpoint(src)
    options = _options(parallel, format, spec, experts, mtp_name, dtype, vocab_divisible_by, vocab_pad, reflink=reflink)
    explain_prepared(convert.prepare_reshard(source, options), dst, overwrite)


def _options(
    parallel: Mesh,
    fmt: Format | None,
    spec: Spec | None,
    experts: Experts | None,
    mtp_name: MtpName | None,
    dtype: Dtype,
    divisible_by: int | None,
    pad: VocabPad,
    allow_inexact: bool = False,
    *,
    reflink: bool = False,
) -> convert.MegatronOptions:
    """The options as the library takes them; what was not given stays as it is in the source."""
    from shardtool.convert import MegatronOptions  # noqa: PLC0415 - numpy and the engine are not needed for --help

    return MegatronOptions(
        parallel,
        format=fmt.value if fmt else "",
        spec=spec.value if spec else "",
        experts=experts.value if experts else "",
        mtp_name=mtp_name.value if mtp_name else "",
        vocab_divisible_by=divisible_by or 0,
        vocab_pad=pad.value,
        dtype=dtype.value,
        allow_inexact=allow_inexact,
        reflink=reflink,
    )


def ready(src: Path, dst: Path, overwrite: bool) -> None:
    """The target as it has to be before anything is read; what a crash has left there is put right."""
    if place()[0] == 0:
        recover(dst, console.say)
    check_destination(src, dst, overwrite=overwrite)


def execute_prepared(
    prepare: Callable[[], convert.Prepared],
    dst: Path,
    overwrite: bool,
    jobs: int,
    no_checksums: bool,
    tensor_digests: bool,
    allow_nan: bool,
) -> None:
    """Prepare and execute a conversion, in every process of a job; the first prints its summary."""
    from shardtool import convert  # noqa: PLC0415 - the engine is not needed for --help
    from shardtool.execute.ranks import Ranks  # noqa: PLC0415

    if no_checksums and tensor_digests:
        raise UsageError("--no-checksums and --tensor-digests exclude each other", hint="leave one of them out")
    threading.stack_size(THREAD_STACK)
    with Ranks() as ranks:
        prepared = prepare()
        write = partial(
            convert.execute, prepared, dst, overwrite=overwrite, jobs=jobs, ranks=ranks, checksums=not no_checksums,
            tensor_digests=tensor_digests, allow_nan=allow_nan,
        )  # fmt: skip
        if ranks.first:  # it speaks for all
            _converted(prepared, dst, ranks.size, write)
        else:
            write()


def _converted(prepared: convert.Prepared, dst: Path, processes: int, write: Callable[..., convert.Summary]) -> None:
    """Write, with progress, and print the result."""
    for line in prepared.verdict.lines() if prepared.verdict else ():
        console.say(line)
    total = sum(
        payload.nbytes for skeleton in prepared.target.skeletons.values() for payload in skeleton.payload.values()
    )
    console.say(
        f"{prepared.direction}: {prepared.source.path} -> {dst}, {prepared.tensors} tensors, {console.size(total)}"
        + (f", {processes} processes" if processes > 1 else "")
    )
    with console.progress(total, prepared.direction) as advance:
        summary = write(progress=advance, say=console.say)
    rate = summary.bytes_written / summary.seconds if summary.seconds else 0
    lines = [
        f"{summary.dst}: {summary.tensors} tensors in {summary.files} files, {console.size(summary.bytes_read)} read, "
        f"{console.size(summary.bytes_written)} written in {summary.seconds:.1f} s ({console.size(rate)}/s), "
        f"peak memory {console.size(summary.peak_memory)}",
        *(prepared.verdict.lines()[:1] if prepared.verdict else ()),
        *(f"note: {note}" for note in summary.notes),
    ]
    if summary.direction not in ("megatron2hf", "translate"):
        lines.append(f"launch flags: shardtool args {dst}")
    console.result(summary.as_dict() | _verdict(prepared), lines)


def _verdict(prepared: convert.Prepared) -> dict[str, Any]:
    return {} if prepared.verdict is None else {"verdict": prepared.verdict.as_dict()}


def explain_prepared(prepared: convert.Prepared, dst: Path | None, overwrite: bool) -> None:
    """Print what a conversion would do."""
    from shardtool.plan.explain import bytes_written, explain, summary  # noqa: PLC0415 - only the dry run needs it

    if dst is not None:
        check_destination(prepared.source.path, dst, overwrite=overwrite)
    target, to_read = prepared.target, prepared.source.nbytes
    if not console.SETTINGS.json:
        written = bytes_written(prepared.plan, prepared.dtypes)
        lines = [
            *(prepared.verdict.lines() if prepared.verdict else ()),
            *explain(prepared.plan, prepared.dtypes, written),
            "",
            f"{len(target.skeletons)} files, {console.size(written.total())} to write, {console.size(to_read)} to read",
            *(f"note: {note}" for note in prepared.notes),
            f"digest {prepared.plan.digest()}",
        ]
        console.result({}, lines)
        return
    data = {
        "direction": prepared.direction,
        "src": str(prepared.source.path),
        "dst": None if dst is None else str(dst),
        "digest": prepared.plan.digest(),
        "bytes_read": to_read,
        "bytes_written": target.nbytes,
        "files": {name: skeleton.size for name, skeleton in target.skeletons.items()},
        "notes": list(prepared.notes),
        **_verdict(prepared),
        "summary": summary(prepared.plan),
        "plan": prepared.plan.as_dict(),
    }
    console.result(data, ())


COMMANDS: dict[str, Callable[..., None]] = {"hf2megatron": hf2megatron, "megatron2hf": megatron2hf, "reshard": reshard}
PLANS: dict[str, Callable[..., None]] = {
    "hf2megatron": plan_hf2megatron,
    "megatron2hf": plan_megatron2hf,
    "reshard": plan_reshard,
}
