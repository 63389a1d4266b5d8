"""The options that several commands share, declared once."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from shardtool.cli.console import SETTINGS
from shardtool.errors import UsageError, a_kind, reason
from shardtool.execute.launcher import cores
from shardtool.layout.mesh import Mesh

LAYOUT, OUTPUT, COMMON = "Parallel layout", "Output", "Common"
WORKER_BYTES = 17 << 20  # the buffers of one worker thread: two tiles, the rows of a scatter, the span of a gather


class Format(StrEnum):
    """Megatron checkpoint formats."""

    torch = "torch"
    torch_dist = "torch_dist"


class Spec(StrEnum):
    """megatron-core layer specs."""

    te = "te"
    local = "local"


class Experts(StrEnum):
    """How per-rank files name experts."""

    grouped = "grouped"
    sequential = "sequential"


class MtpName(StrEnum):
    """The layer inside a multi-token-prediction layer of per-rank files."""

    mtp_model_layer = "mtp_model_layer"
    transformer_layer = "transformer_layer"


class Dtype(StrEnum):
    """Dtypes of converted tensors."""

    keep = "keep"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class VocabPad(StrEnum):
    """What fills rows of the padded vocabulary."""

    zeros = "zeros"
    mean = "mean"
    last = "last"


def _recipe(ctx: typer.Context, file: Path | None) -> Path | None:
    """Take a recipe's entries as the defaults of this command's options."""
    if file is None:
        return None
    import tomllib  # noqa: PLC0415 - slow to import, and only recipes need it

    try:
        recipe = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            "the recipe cannot be read",
            where=str(file),
            found=reason(error),
            hint="give the path of a recipe that is there and yours to read"
            if isinstance(error, OSError)
            else "write it as TOML: option names without the dashes, and values",
        ) from error
    values = {name.replace("-", "_"): value for name, value in recipe.items()}
    if tables := sorted(name for name, value in values.items() if isinstance(value, dict | list)):
        raise UsageError(
            "a recipe's entry is no option's value",
            where=f"{file}: --{tables[0].replace('_', '-')}",
            expected="a number, a text, true or false",
            found=a_kind(values[tables[0]]),
            hint="write the option's name, =, and its value on one line",
        )
    known = {str(parameter.name) for parameter in ctx.command.params if parameter.name}
    if unknown := sorted(values.keys() - known):
        raise UsageError(
            "the recipe has unknown entries",
            where=str(file),
            expected=", ".join(sorted(known)),
            found=", ".join(unknown),
            hint="leave them out, or correct their names",
        )
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return file


def _set(name: str) -> Any:
    def callback(value: bool) -> bool:
        setattr(SETTINGS, name, value)
        return value

    return callback


# fmt: off
Source = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint directory, or a hub id.", show_default=False)]
Target = Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.", show_default=False)]
MaybeTarget = Annotated[Path | None, typer.Argument(metavar="[DST]", help="Where it would go; nothing is written.", show_default=False)]

Tp = Annotated[int, typer.Option("--tp", min=1, help="Tensor parallel size.", rich_help_panel=LAYOUT)]
Pp = Annotated[int, typer.Option("--pp", min=1, help="Pipeline parallel size.", rich_help_panel=LAYOUT)]
Vpp = Annotated[int, typer.Option("--vpp", min=1, help="Virtual stages per pipeline stage.", rich_help_panel=LAYOUT)]
Ep = Annotated[int, typer.Option("--ep", min=1, help="Expert parallel size.", rich_help_panel=LAYOUT)]
Etp = Annotated[int | None, typer.Option("--etp", min=1, help="Expert tensor parallel size. [default: as --tp]", rich_help_panel=LAYOUT, show_default=False)]
First = Annotated[int | None, typer.Option("--first-stage-layers", min=0, help="Layers of the first pipeline stage.", rich_help_panel=LAYOUT)]
Last = Annotated[int | None, typer.Option("--last-stage-layers", min=0, help="Layers of the last pipeline stage.", rich_help_panel=LAYOUT)]
PipelineLayout = Annotated[str | None, typer.Option("--pipeline-layout", metavar="STR", help="Stages in Megatron's letters, such as 'Et*3|(tt|)*6L'.", rich_help_panel=LAYOUT)]
AccountEmbedding = Annotated[bool, typer.Option("--account-for-embedding", help="Count the embedding as a layer of the split.", rich_help_panel=LAYOUT)]
AccountLoss = Annotated[bool, typer.Option("--account-for-loss", help="Count the loss as a layer of the split.", rich_help_panel=LAYOUT)]

FormatOption = Annotated[Format, typer.Option("--format", help="Checkpoint format.", rich_help_panel=OUTPUT)]
MaybeFormat = Annotated[Format | None, typer.Option("--format", help="Checkpoint format. [default: that of SRC]", rich_help_panel=OUTPUT, show_default=False)]
SpecOption = Annotated[Spec, typer.Option("--spec", help="Key spelling in per-rank files: Transformer Engine's or the local spec's.", rich_help_panel=OUTPUT)]
MaybeSpec = Annotated[Spec | None, typer.Option("--spec", help="Key spelling in per-rank files. [default: that of SRC]", rich_help_panel=OUTPUT, show_default=False)]
ExpertsOption = Annotated[Experts, typer.Option("--experts", help="How per-rank files name experts.", rich_help_panel=OUTPUT)]
MaybeExperts = Annotated[Experts | None, typer.Option("--experts", help="How per-rank files name experts. [default: that of SRC]", rich_help_panel=OUTPUT, show_default=False)]
MtpOption = Annotated[MtpName, typer.Option("--mtp-name", help="The layer inside an MTP layer of per-rank files: mtp_model_layer since megatron-core 0.17, transformer_layer before.", rich_help_panel=OUTPUT)]
MaybeMtp = Annotated[MtpName | None, typer.Option("--mtp-name", help="The layer inside an MTP layer of per-rank files. [default: that of SRC]", rich_help_panel=OUTPUT, show_default=False)]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Cast every tensor, or keep what is stored.", rich_help_panel=OUTPUT)]
Inexact = Annotated[bool, typer.Option("--allow-inexact", help="Convert the weights of a model that megatron-core computes differently, too.", rich_help_panel=OUTPUT)]
Divisible = Annotated[int, typer.Option("--vocab-divisible-by", min=1, help="The padded vocabulary is a multiple of this times tp.", rich_help_panel=OUTPUT)]
MaybeDivisible = Annotated[int | None, typer.Option("--vocab-divisible-by", min=1, help="The padded vocabulary is a multiple of this times tp. [default: that of SRC]", rich_help_panel=OUTPUT, show_default=False)]
Pad = Annotated[VocabPad, typer.Option("--vocab-pad", help="What fills the padding rows.", rich_help_panel=OUTPUT)]
Hf = Annotated[Path | None, typer.Option("--hf", metavar="DIR|CONFIG", help="The Hugging Face model: config, tokenizer and chat template come from it.", rich_help_panel=OUTPUT)]
ShardSize = Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest safetensors file.", rich_help_panel=OUTPUT)]
DialectOption = Annotated[str | None, typer.Option("--dialect", metavar="NAME", help="The names on disk where a family has several: per-expert, or fused as transformers 5 keeps experts. [default: those that the family is published with]", rich_help_panel=OUTPUT, show_default=False)]
NoChecksums = Annotated[bool, typer.Option("--no-checksums", help="No SHA-256 of the files in shardtool.json, and no look for NaN in values that only move.", rich_help_panel=OUTPUT)]
TensorDigests = Annotated[bool, typer.Option("--tensor-digests", help="Also the SHA-256 of every tensor in shardtool.json.", rich_help_panel=OUTPUT)]
Reflink = Annotated[bool, typer.Option("--reflink", help="Share blocks with the source where weights only move, on XFS, Btrfs and the like: records are laid out for it.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DST: the new one is complete before the old one goes.", rich_help_panel=OUTPUT)]

AllowNan = Annotated[bool, typer.Option("--allow-nan", help="Take NaN, Inf and values too large for a new dtype as they are, with a note.", rich_help_panel=OUTPUT)]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Worker threads.", rich_help_panel=COMMON)]
Budget = Annotated[str, typer.Option("--memory-budget", metavar="SIZE", help="Most memory for buffers.", rich_help_panel=COMMON)]
Recipe = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A recipe: a TOML table of option names and values.", callback=_recipe, is_eager=True, rich_help_panel=COMMON)]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.", callback=_set("json"), is_eager=True, rich_help_panel=COMMON)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.", callback=_set("quiet"), is_eager=True, rich_help_panel=COMMON)]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more.", callback=_set("verbose"), is_eager=True, rich_help_panel=COMMON)]
# fmt: on

DEFAULT_JOBS = min(4, cores())


def mesh(
    tp: int, pp: int, vpp: int, ep: int, etp: int | None, first: int | None, last: int | None,
    layout: str | None, account_embedding: bool, account_loss: bool,
) -> Mesh:  # fmt: skip
    """The parallel layout that the options describe."""
    return Mesh(tp, pp, vpp, ep, etp, first, last, account_embedding, account_loss, layout)


def bytes_of(text: str, option: str) -> int:
    """A size such as 512MiB, 5GB or 1000; UsageError where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if not match:
        raise UsageError(
            f"{option} is no size",
            expected="a size such as 512MiB or 5GB",
            found=text,
            hint="give a number with a unit",
        )
    power = " KMGT".index(match[2].upper() or " ")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise UsageError(f"{option} must be at least one byte", found=text, hint="give a larger size")
    return size


def workers(jobs: int, budget: str) -> int:
    """The number of worker threads that fit the memory budget."""
    fitting = bytes_of(budget, "--memory-budget") // WORKER_BYTES
    if fitting < 1:
        raise UsageError(
            "--memory-budget is too small",
            expected=f"at least {WORKER_BYTES >> 20}MiB",
            found=budget,
            hint="give more: it is the size of the buffers of one thread",
        )
    return min(jobs, fitting)


def checkpoint(source: str) -> Path:
    """SRC as a directory: a local path, or a hub id (`org/name`) which is downloaded.

    Raises UsageError where it is neither, or where the hub cannot be reached.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        if not path.exists():
            raise UsageError(
                "the source does not exist", where=source, hint="give a directory, or a hub id such as org/name"
            )
        return path
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only where a hub id is given

    patterns = [
        "*.safetensors",
        "*.safetensors.index.json",
        "pytorch_model*.bin*",
        "*.json",
        "*.model",
        "*.txt",
        "*.jinja",
    ]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        raise UsageError(
            "the source is no local directory, and the hub cannot give it",
            where=source,
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200],
            hint="give a local directory",
        ) from error
