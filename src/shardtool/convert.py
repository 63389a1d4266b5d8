"""The conversions: Hugging Face to Megatron, Megatron to Hugging Face, Megatron to Megatron.

Each is prepared first (headers read, layouts made, the plan checked: `Prepared`), then executed. Nothing is written
before every check has passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from shardtool.checkpoint.companions import companions
from shardtool.checkpoint.constants import check_constants
from shardtool.checkpoint.huggingface import (
    HuggingFace,
    config_bytes,
    huggingface_target,
    open_huggingface,
    read_config,
    understood,
)  # fmt: skip
from shardtool.checkpoint.limits import check_exportable, check_tied_mtp, version_notes
from shardtool.checkpoint.megatron import Megatron, read_megatron
from shardtool.checkpoint.megatron_target import dist_target, legacy_target, rank_files
from shardtool.checkpoint.opened import Opened
from shardtool.checkpoint.structure import structure
from shardtool.checkpoint.target import resolve_dtypes, target_tensors
from shardtool.conversion import Prepared, Summary, execute, shareable
from shardtool.errors import CheckpointError, UsageError, unknown_value
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import axis_sizes, standard
from shardtool.families.exactness import inexact
from shardtool.families.family import TRAINING_ONLY, Family, describe_differences
from shardtool.families.launch_flags import launch_flags, without_flag
from shardtool.families.megatron_args import FAMILY_NAME, GROUP_SCORE, INEXACT, ZERO_OUT_BIAS
from shardtool.families.megatron_args_out import to_args
from shardtool.families.registry import family_of, infer_family
from shardtool.formats.tracker import TRACKER, iteration_name, tracker_bytes
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import Layout, centred
from shardtool.layout.megatron import Spelling, dist_layout, legacy_layout
from shardtool.layout.mesh import Mesh, chunks, padded_vocab, virtual_stages
from shardtool.layout.rules import Rule
from shardtool.plan.plan import plan

# the library's face: what a direction prepares, `execute` writes
__all__ = [
    "DEFAULTS", "DTYPES", "MegatronOptions", "Prepared", "Summary", "execute", "flags_of", "prepare_hf2megatron",
    "prepare_megatron2hf", "prepare_reshard",
]  # fmt: skip

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class MegatronOptions(Struct, frozen=True):
    """How a Megatron checkpoint is to be written. Empty and 0: as in the source, else as in `DEFAULTS`.

    `allow_inexact` converts a model that megatron-core computes differently (families.exactness), which is refused otherwise.
    """

    mesh: Mesh = field(default_factory=Mesh)
    format: str = ""
    spec: str = ""
    experts: str = ""
    mtp_name: str = ""
    vocab_divisible_by: int = 0
    vocab_pad: str = "zeros"
    dtype: str = "keep"
    allow_inexact: bool = False
    reflink: bool = False  # laid out to share blocks with the source


DEFAULTS = MegatronOptions(
    format="torch_dist", spec="te", experts="grouped", mtp_name="mtp_model_layer", vocab_divisible_by=128
)


def _filled(options: MegatronOptions, **held: Any) -> MegatronOptions:
    """The options with what was not asked for taken from `held`, else from the defaults."""
    unset = [
        name for name in ("format", "spec", "experts", "mtp_name", "vocab_divisible_by") if not getattr(options, name)
    ]
    return replace(options, **{name: held.get(name) or getattr(DEFAULTS, name) for name in unset})


def prepare_hf2megatron(src: Path, options: MegatronOptions) -> Prepared:
    """Hugging Face directory to Megatron: `release/` in the layout of `options`."""
    source = open_huggingface(src)
    a = source.opened.architecture
    if (reason := inexact(a)) and not options.allow_inexact:
        raise UsageError(
            f"megatron-core computes another function from this {source.family.model_type} model's weights: {reason}",
            where=str(src),
            hint="--allow-inexact converts the weights all the same: for code that computes it as the original does",
        )
    check_constants(source.opened)
    notes = source.family.caveats(a) + without_flag(a) + _inexact_note(a)
    if a.zero_out_bias:
        notes += ("the bias on the attention's output is zeros and left out; megatron2hf writes zeros again",)
    if a.centred_norms and options.spec == "local":
        notes += ("norms are written as 1 + weight, rounded to the dtype; --spec te keeps the weights as they are",)
    return _to_megatron("hf2megatron", source.opened, a, source.opened.layout.rules, _filled(options), None, notes)


def prepare_reshard(src: Path, options: MegatronOptions) -> Prepared:
    """Megatron to Megatron in another layout; the iteration stays, and so does the format unless it is asked for.

    Where the args describe another structure than the tensors have, the tensors decide, and a note says so.
    """
    source = read_megatron(src)
    notes = _left_behind(source) + _inexact_note(source.architecture)
    if differences := _differences(source):
        notes += (f"the args and the tensors differ, the tensors were followed: {'; '.join(differences)}",)
        source = replace(source, architecture=structure(source))
    spelling = source.spelling
    options = _filled(
        options,
        format=source.format,
        spec=spelling.spec,
        experts=spelling.experts if spelling.experts in ("grouped", "sequential") else None,
        mtp_name=spelling.mtp,
        vocab_divisible_by=source.args.get("make_vocab_size_divisible_by"),
    )
    a = source.architecture
    padded = padded_vocab(a.vocab_size, options.vocab_divisible_by, options.mesh.tp)
    # rows that both layouts have room for are carried over as they are, also those beyond the vocabulary
    rules = standard(a)
    opened = source.open(rules, min(padded, source.padded_vocab))
    return _to_megatron("reshard", opened, a, rules, options, source.save.iteration, notes, source.args)


def _differences(source: Megatron) -> list[str]:
    """One line per field in which the model of the args and that of the tensors differ."""
    return describe_differences(source.architecture, structure(source))


def _to_megatron(
    direction: str,
    source: Opened,
    a: Architecture,
    rules: tuple[Rule, ...],
    options: MegatronOptions,
    iteration: int | None,
    notes: tuple[str, ...],
    run: Mapping[str, Any] | None = None,
) -> Prepared:
    mesh = options.mesh
    _check_options(options, a)
    # megatron-core has gamma - 1 with Transformer Engine's norms alone (transformer/torch_norm.py)
    a = replace(a, centred_norms=a.centred_norms and options.spec == "te")
    padded = padded_vocab(a.vocab_size, options.vocab_divisible_by, mesh.tp)
    model_chunks = chunks(mesh, a.num_layers, a.mtp_depth)
    check_tied_mtp(options.format, options.mesh, a, model_chunks)
    sizes = source.layout.sizes
    target_layout: Layout
    if options.format == "torch":
        files = rank_files(mesh, experts=a.moe is not None)
        spelling = Spelling(options.spec, options.experts, options.mtp_name)
        target_layout = legacy_layout(rules, sizes, padded, model_chunks, mesh, spelling, files)
    else:
        target_layout = dist_layout(rules, sizes, padded, model_chunks, mesh, stacked=a.uniform)
    if a.centred_norms:
        target_layout = centred(target_layout)
    made = plan(source.layout, target_layout, pad=options.vocab_pad)
    dtypes = resolve_dtypes(made, source.headers, DTYPES.get(options.dtype), str(source.path))
    tensors = target_tensors(made, dtypes)
    shared = shareable(made, tensors, source) if options.reflink else None
    main = next(tensor.dtype for tensor in tensors if tensor.key[1] == "embedding.word_embeddings.weight")
    args = to_args(
        a,
        mesh,
        padded=padded,
        divisible_by=options.vocab_divisible_by,
        dtype=main,
        fmt=options.format,
        spec=options.spec,
    )
    if run is not None:
        args = _carry_run(args, run)
    number = iteration or 0
    if options.format == "torch":
        target = legacy_target(tensors, args, files, virtual_stages(mesh), number, options.spec, shared)
    else:
        target = dist_target(tensors, target_layout, args, a, number, shared)
    return Prepared(
        direction, source, made, target, a, iteration_name(iteration), {TRACKER: tracker_bytes(iteration)},
        notes=notes + version_notes(a), dtypes=dtypes, options=_as_options(options),
    )  # fmt: skip


def _as_options(options: MegatronOptions) -> dict[str, Any]:
    """The options by their names on the command line; of the mesh those that are not the default."""
    values = {name: value for name, value in to_builtins(options).items() if name != "mesh"}
    mesh, plain = to_builtins(options.mesh), to_builtins(Mesh())
    return {name: value for name, value in mesh.items() if value != plain[name]} | values


# no tensor shows these: they are the source's, or they are left out
NOT_IN_TENSORS = (
    "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
    "moe_router_num_groups", "moe_router_group_topk", GROUP_SCORE, INEXACT, "rope_type", "rotary_scaling_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", FAMILY_NAME, ZERO_OUT_BIAS,
)  # fmt: skip


def _carry_run(args: dict[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The args of the source run, with those that the new layout decides replaced. Only plain data is carried."""
    plain = {name: value for name, value in run.items() if name != "rank" and _is_plain(value)}  # each file has its own
    kept = {name: value for name, value in args.items() if name in plain or name not in NOT_IN_TENSORS}
    progress = ("consumed_train_samples", "consumed_valid_samples", "seq_length", "moe_router_load_balancing_type")
    kept = {name: plain.get(name, value) if name in progress else value for name, value in kept.items()}
    return {**plain, **kept}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _check_options(options: MegatronOptions, a: Architecture) -> None:
    for name, value, known in (
        ("--format", options.format, ("torch", "torch_dist")),
        ("--spec", options.spec, ("te", "local")),
        ("--dtype", options.dtype, ("keep", *DTYPES)),
        ("--vocab-pad", options.vocab_pad, ("zeros", "mean", "last")),
        ("--experts", options.experts, ("grouped", "sequential")),
        ("--mtp-name", options.mtp_name, ("transformer_layer", "mtp_model_layer")),
    ):
        if value not in known:
            raise unknown_value(name, value, known)
    if options.vocab_divisible_by < 1:
        raise unknown_value("--vocab-divisible-by", options.vocab_divisible_by, ["1 or more"])
    if a.moe and a.linear_bias and options.mesh.expert_tp > 1:
        raise UsageError(
            "experts with biases are not split over tensor parallel ranks",
            expected="--etp 1: megatron-core adds the bias on every rank (transformer_config.py 0.16.1)",
            found=f"--etp {options.mesh.expert_tp}",
            hint="give --etp 1",
        )
    if a.moe is None and (options.mesh.ep > 1 or options.mesh.etp not in (None, options.mesh.tp)):
        raise UsageError(
            "--ep and --etp need experts",
            where=f"{a.family or 'this'} model",
            found="a dense model",
            hint="leave them out",
        )


def prepare_megatron2hf(
    src: Path,
    hf: Path | None,
    *,
    dtype: str = "keep",
    max_shard_size: int = 5 * 10**9,
    dialect: str | None = None,
    reflink: bool = False,
) -> Prepared:
    """Megatron to a Hugging Face directory.

    Without `hf` config.json is made from the checkpoint's args. With it (a directory or a config.json) the config is
    taken over, after a comparison with the args; the true vocabulary size, tokenizer, chat template and generation
    config come from there. `dialect` chooses the names on disk, where the family has several.
    """
    source = read_megatron(src)
    if dtype not in ("keep", *DTYPES):
        raise unknown_value("--dtype", dtype, ("keep", *DTYPES))
    notes = _left_behind(source) + _inexact_note(source.architecture)
    check_exportable(source)
    if differences := _differences(source):
        raise CheckpointError(
            "the checkpoint's args describe another model than its tensors are",
            where=str(source.save.directory),
            details=tuple(f"{line} (args and tensors)" for line in differences),
            hint="`shardtool reshard` goes by the tensors; config.json needs args that are right",
        )
    family, a, given = _target_family(source, hf)
    if not given and not source.args.get("vocab_size"):
        notes += (
            f"the args have no vocab_size: all {source.padded_vocab} stored rows are exported; --hf gives the true size",
        )
    rules = family.speaking(dialect).rules(a)
    opened = source.open(rules, a.vocab_size)
    layout = huggingface_layout(rules, axis_sizes(a))
    made = plan(opened.layout, layout)
    dtypes = resolve_dtypes(made, opened.headers, DTYPES.get(dtype), str(src))
    tensors = target_tensors(made, dtypes)
    target = huggingface_target(tensors, max_shard_size, shareable(made, tensors, opened) if reflink else None)
    main = next(tensor.dtype for tensor in tensors)
    config = {**given} if given else family.write_config(a, main)
    config["dtype" if "dtype" in config else "torch_dtype"] = main
    config.pop("quantization_config", None)  # what is written is dequantised
    tokenizer = hf if hf is not None and hf.is_dir() else None
    if tokenizer is not None:
        companions(tokenizer, config_bytes(config))  # refuse now what could not be copied at the end
    options = {"hf": None if hf is None else str(hf), "dtype": dtype, "max_shard_size": max_shard_size}
    options |= {"reflink": True} if reflink else {}
    options |= {"dialect": dialect} if dialect else {}
    return Prepared(
        "megatron2hf", opened, made, target, a, "", {"config.json": config_bytes(config)}, tokenizer, notes, dtypes,
        options,
    )  # fmt: skip


def _target_family(source: Megatron, hf: Path | None) -> tuple[Family, Architecture, Mapping[str, Any]]:
    """The family, the architecture with its true vocabulary size, and the given config (empty without one)."""
    a = source.architecture
    if hf is None:
        family = infer_family(a, str(source.args[FAMILY_NAME]) if source.args.get(FAMILY_NAME) else None)
        return family, replace(a, family=family.model_type), {}
    config = read_config(hf)
    family, theirs = understood(lambda: _read(config), hf)
    # what the weights contain is the given config's to say: a run of Megatron-LM does not keep it in its args
    ignore = {"family", "mtp_layers", "folded", "zero_out_bias", *TRAINING_ONLY}
    if a.rope is not None:
        ignore.add("max_positions")  # training may have seen shorter sequences than the model allows
    if not source.args.get("vocab_size"):
        ignore.add("vocab_size")
    differences = describe_differences(a, theirs, frozenset(ignore))
    if differences:
        raise CheckpointError(
            "the checkpoint and the Hugging Face config are different models",
            where=f"{source.path} and {hf}",
            details=tuple(f"{line} (checkpoint and config)" for line in differences),
            hint="give the config of the model that was trained, or leave out --hf to have config.json made from the args",
        )
    return family, replace(theirs, mtp_layers=a.mtp_layers), config


def _read(config: Mapping[str, Any]) -> tuple[Family, Architecture]:
    family = family_of(config)
    return family, family.read_config(config)


def _inexact_note(a: Architecture) -> tuple[str, ...]:
    reason = inexact(a)
    return (f"megatron-core computes another function from these weights: {reason}",) if reason else ()


def _left_behind(source: Megatron) -> tuple[str, ...]:
    if not source.not_converted:
        return ()
    return (f"only the model is converted; left behind: {', '.join(source.not_converted)}",)


def flags_of(source: Megatron | HuggingFace, mesh: Mesh | None = None, *, stored_only: bool | None = None) -> list[str]:
    """The Megatron-LM launch flags of a checkpoint (see families.launch_flags)."""
    if isinstance(source, Megatron):
        a, parallel, dtype, fmt = source.architecture, source.mesh, source.dtype, source.format
        divisible_by = source.args.get("make_vocab_size_divisible_by") or 128
        only = True if stored_only is None else stored_only
    else:
        a, parallel, fmt, divisible_by = source.opened.architecture, mesh or Mesh(), "torch_dist", 128
        dtype = max(source.opened.dtypes().items(), key=lambda item: item[1])[0]
        only = bool(stored_only)
    return launch_flags(a, parallel, dtype, divisible_by=divisible_by, fmt=fmt, stored_only=only)
