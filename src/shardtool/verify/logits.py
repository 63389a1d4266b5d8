"""The logits level: run both sides on the same prompts and compare.

Light to import: torch, transformers and megatron-core are imported when a comparison runs.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from shardtool.errors import CheckpointError, UsageError
from shardtool.layout.mesh import chunks
from shardtool.verify import pool as workers
from shardtool.verify.files import iteration_directory
from shardtool.verify.prompts import Limits, PromptSet, make_prompts, traced_positions
from shardtool.verify.report import LogitsReport
from shardtool.verify.sides import HuggingFaceSide, MegatronSide, Side

if TYPE_CHECKING:
    import torch

    from shardtool.verify.huggingface import Attention
    from shardtool.verify.outputs import Outputs

DtypeName = Literal["fp32", "bf16", "fp16", "native"]

TORCH_NAMES: dict[str, workers.Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Right conversions measure 2e-6 to 3e-6 on models of 4 layers and 1.2e-5 on one of 30 (SmolLM2-135M; its eager against
# its sdpa attention: 1.0e-5). The smallest fault measured is the erf gelu in place of the tanh one on 4 layers: 9.3e-4.
FP32_THRESHOLD = 1e-4
# Of both sides' roundings together. 1 would do where the weights are the same numbers; a conversion that folds a factor
# into a weight (Gemma's embedding, Granite's residuals) rounds the product once more.
ROUNDINGS = 1.5
# Wrong layouts measure 0.1 and more. A dtype whose rounding is near that at most positions decides nothing.
LARGEST_BOUND = 0.5


def compare_logits(
    a: Side,
    b: Side,
    *,
    prompts: PromptSet | None = None,
    dtype: DtypeName = "fp32",
    threshold: float | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    timeout: float = workers.DEFAULT_TIMEOUT,
) -> LogitsReport:
    """Do both sides give the same logits at every position of every prompt? `a` is the reference.

    `prompts` are made to fit both sides when not given (`seed`, `max_tokens`: see make_prompts). `timeout` is in
    seconds and bounds each run of megatron-core.

    fp32: both sides compute in fp32, whatever is stored. The threshold for max |a - b| / std(a) lies between what right
    conversions measure and what the smallest faults do (see FP32_THRESHOLD); wrong layouts measure 0.1 and more.

    bf16, fp16, or native (the stored dtype of a Hugging Face side's config, else of a's embedding): both sides compute
    in that dtype, and each also in fp32. What the dtype changes on a side is that side's rounding, at each position by
    itself. Two right implementations cannot be farther apart at a position than both roundings and FP32_THRESHOLD
    together, so ROUNDINGS times that is the threshold there: a right conversion is never refused, also where rounding
    sends tokens to other experts. It is weaker than fp32: a change smaller than the rounding passes. Rounding near what
    wrong layouts measure, at half of the positions or more, is a problem in the report: nothing can be told then.

    A side that cannot be loaded whole (missing or unexpected tensors, a missing file) is a problem in the report, which
    then does not pass. Raises UsageError when the request makes no sense or megatron-core cannot express the model.
    """
    prompts = _prompts_for(a, b, seed, max_tokens) if prompts is None else prompts
    if not prompts.positions:
        nothing = ("there are no prompts: nothing was compared",)
        return LogitsReport(a.label, b.label, dtype, FP32_THRESHOLD, "the default of fp32", problems=nothing)
    name = _native(a, b) if dtype == "native" else dtype
    for side in (a, b):
        if isinstance(side, MegatronSide):
            # refuses an impossible layout before anything runs
            chunks(side.mesh, side.architecture.num_layers, side.architecture.mtp_depth)
            workers.get_pool(side.mesh.tp)  # starts while transformers runs
    runs = _Runs(prompts, timeout)
    report = LogitsReport(
        a.label,
        b.label,
        dtype=name,
        threshold=FP32_THRESHOLD if threshold is None else threshold,
        threshold_from="the default of fp32" if threshold is None else "given",
        coverage=prompts.coverage,
        seconds=runs.seconds,
    )
    problems: list[str] = []
    outputs: list[Outputs] = []
    for label, side in (("a", a), ("b", b)):
        try:
            outputs.append(runs.run(label, side, name))
        except CheckpointError as error:
            problems.append(f"side {label}: {error}")
    if problems:
        return replace(report, problems=tuple(problems))
    vocab_size = _common_vocab(a, b, problems)
    report = replace(report, coverage=(*prompts.coverage, *_experts(outputs)))
    bounds = None
    if threshold is None and name != "fp32":
        bounds = _bounds((a, b), outputs, runs, vocab_size)
        typical = float(bounds.median() / outputs[0].logits[:, :vocab_size].std())
        if not math.isfinite(typical):
            problems.append(f"the {name} rounding cannot be measured: it is {typical}")
        elif typical > LARGEST_BOUND:
            problems.append(
                f"the {name} rounding of a and b is {typical:.2g} at most positions, which a wrong conversion could hide"
                " in: compare in fp32"
            )
    return _judged(report, outputs, prompts, vocab_size, problems, bounds)


def _judged(
    report: LogitsReport,
    outputs: list[Outputs],
    prompts: PromptSet,
    vocab_size: int,
    problems: list[str],
    bounds: torch.Tensor | None,
) -> LogitsReport:
    from shardtool.verify.metrics import distance, first_diverging  # noqa: PLC0415 - heavy

    found, wrong = distance(outputs[0], outputs[1], prompts.prompts, vocab_size, bounds)
    if bounds is not None:
        threshold = found.bound / found.std if found.std > 0 else math.nan
        report = replace(report, threshold=threshold, threshold_from=f"the {report.dtype} rounding of a and b there")
    diverging = None
    if bounds is None or not found.ratio <= report.threshold:  # rounding alone shows in hidden states, too
        diverging = first_diverging(found.layers, report.threshold)
    if diverging is None and not found.ratio <= report.threshold:
        diverging = "output layer" if found.layers else "unknown: the sides have different layers"
    return replace(report, measured=found, first_diverging=diverging, problems=(*problems, *wrong))


class _Runs(Struct, frozen=True):
    """Runs models on the same prompts, and keeps the time of each run."""

    prompts: PromptSet
    timeout: float
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, label: str, side: Side, dtype: str, attention: Attention = "eager") -> Outputs:
        """The outputs of one side in a dtype (by its short name)."""
        start = time.monotonic()
        try:
            return _run(side, self.prompts, TORCH_NAMES[dtype], attention, self.timeout)
        finally:
            self.seconds[label] = time.monotonic() - start


def run_side(
    side: Side,
    prompts: PromptSet,
    *,
    dtype: DtypeName = "fp32",
    attention: Attention = "eager",
    timeout: float = workers.DEFAULT_TIMEOUT,
) -> Outputs:
    """The logits and hidden states of one side.

    Raises CheckpointError when it cannot be loaded whole, UsageError when megatron-core cannot express the model.
    """
    name = _native(side, side) if dtype == "native" else dtype
    return _run(side, prompts, TORCH_NAMES[name], attention, timeout)


def _run(side: Side, prompts: PromptSet, dtype: workers.Dtype, attention: Attention, timeout: float) -> Outputs:
    import torch  # noqa: PLC0415 - heavy

    from shardtool.verify.outputs import Outputs  # noqa: PLC0415 - heavy

    traced = traced_positions(prompts.prompts)
    if isinstance(side, HuggingFaceSide):
        from shardtool.verify import huggingface  # noqa: PLC0415 - heavy

        return huggingface.run(side.path, prompts.prompts, traced, dtype=getattr(torch, dtype), attention=attention)
    directory = iteration_directory(side.path)
    with tempfile.TemporaryDirectory(prefix="shardtool-verify-") as scratch:
        output = Path(scratch) / "outputs.pt"
        job = workers.Job(directory.absolute(), side.architecture, side.mesh, prompts.prompts, traced, dtype, output)
        workers.get_pool(side.mesh.tp).run(job, timeout)
        # mapped, not read: the pages stay valid after the file's name is gone
        found = torch.load(output, mmap=True, weights_only=True)
    return Outputs(found["logits"], found["hidden"], found["experts"] if found["experts"].numel() else None)


def _experts(outputs: list[Outputs]) -> tuple[str, ...]:
    """Which experts the prompts reach, where a side can tell."""
    used = next((found.experts for found in outputs if found.experts is not None), None)
    if used is None:
        return ()
    count, total = int(used.sum()), used.numel()
    return (f"{count} of {total} experts ({used.shape[1]} in each of {used.shape[0]} layers)",)


def _bounds(sides: tuple[Side, Side], outputs: list[Outputs], runs: _Runs, vocab_size: int) -> torch.Tensor:
    """How far apart the logits of each position may be: the roundings of both sides, and what fp32 may differ by."""
    from shardtool.verify.metrics import row_gaps  # noqa: PLC0415 - heavy

    total = FP32_THRESHOLD * outputs[0].logits[:, :vocab_size].std()
    for label, side, found in zip("ab", sides, outputs, strict=True):
        total = total + ROUNDINGS * row_gaps(found, runs.run(f"{label} in fp32", side, "fp32"), vocab_size)
    return total


def _config(side: HuggingFaceSide) -> dict[str, Any]:
    path = side.path / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the directory has no readable config.json",
            where=str(path),
            found=str(error),
            hint="take config.json again from where the model comes from",
        ) from error
    if not isinstance(config, dict) or "vocab_size" not in config:
        raise CheckpointError(
            "the config names no vocabulary",
            where=str(path),
            expected="vocab_size",
            hint="take config.json again from where the model comes from",
        )
    return config


def limits(side: Side) -> Limits:
    """What prompts fit a side. Raises CheckpointError when a Hugging Face directory does not say."""
    if isinstance(side, MegatronSide):
        arch = side.architecture
        scaling = arch.rope.scaling if arch.rope is not None else None
        original = scaling.original_max_positions if scaling is not None and scaling.kind != "linear" else None
        return Limits(arch.vocab_size, arch.max_positions, arch.window, original)
    config = _config(side)
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return Limits(int(config["vocab_size"]), int(positions or 2048), window, original)


def _prompts_for(a: Side, b: Side, seed: int, max_tokens: int | None) -> PromptSet:
    left, right = limits(a), limits(b)
    common = Limits(
        min(left.vocab_size, right.vocab_size),
        min(left.max_positions, right.max_positions),
        left.window or right.window,
        left.original_max_positions or right.original_max_positions,
    )
    tokenizer = next(
        (
            side.path
            for side in (a, b)
            if isinstance(side, HuggingFaceSide)
            and any((side.path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
        ),
        None,
    )
    options: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    return make_prompts(common, seed=seed, tokenizer=tokenizer, **options)


def _common_vocab(a: Side, b: Side, problems: list[str]) -> int:
    sizes = [limits(side).vocab_size for side in (a, b)]
    if sizes[0] != sizes[1]:
        problems.append(f"the vocabularies differ: {sizes[0]} tokens in a, {sizes[1]} in b")
    return min(sizes)


def _native(a: Side, b: Side) -> str:
    """The dtype that the checkpoint is stored in, by its name here."""
    stored = None
    for side in (a, b):
        if isinstance(side, HuggingFaceSide):
            config = _config(side)
            stored = str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix("torch.")
            break
    if stored is None:
        from shardtool.verify.megatron_load import stored_embedding  # noqa: PLC0415 - heavy

        assert isinstance(a, MegatronSide)
        stored = str(stored_embedding(iteration_directory(a.path), a.mesh)[1]).removeprefix("torch.")
    for name, torch_name in TORCH_NAMES.items():
        if torch_name == stored:
            return name
    raise UsageError(
        "the checkpoint's dtype is none to compute in",
        expected="bfloat16, float16, float32",
        found=stored,
        hint="give --dtype fp32, bf16 or fp16",
    )
