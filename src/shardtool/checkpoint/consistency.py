"""Whether what a Megatron save says of itself fits together: its args, its iteration, and the ranks with each other."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from shardtool.errors import CheckpointError, heads_and_groups, located, no_model
from shardtool.families.architecture import Architecture
from shardtool.families.megatron_args import ARGS_WRONG, from_args
from shardtool.formats.inert import brief
from shardtool.formats.megatron_legacy import Rank, RankFile
from shardtool.formats.small_files import open_file
from shardtool.formats.stored import Stored
from shardtool.formats.tracker import Iteration, iteration_name

Ranks = Mapping[Rank, RankFile]

MOST = 100_000  # layers, experts, stages: what is written out one by one
LARGEST = 1 << 40  # any other size
# entries of args that are sizes, where they are there: those that cannot be zero, and those that say "none" by it
SIZES = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "vocab_size", "max_position_embeddings", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size", "world_size",
    "make_vocab_size_divisible_by", "qk_head_dim", "v_head_dim", "kv_lora_rank",
)  # fmt: skip
COUNTS = (
    "padded_vocab_size", "seq_length", "num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_num_groups",
    "moe_router_group_topk", "moe_shared_expert_intermediate_size", "q_lora_rank", "qk_pos_emb_head_dim",
    "mtp_num_layers", "original_max_position_embeddings", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)  # fmt: skip
LISTED = ("num_layers", "num_experts", "mtp_num_layers", "tensor_model_parallel_size", "pipeline_model_parallel_size",
          "expert_model_parallel_size", "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size")  # fmt: skip
NUMBERS = (
    "norm_epsilon", "layernorm_epsilon", "rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor",
    "rope_scaling_factor", "rotary_scaling_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "moe_router_topk_scaling_factor", "attention_dropout", "hidden_dropout",
)  # fmt: skip
TEXTS = ("normalization", "position_embedding_type", "moe_router_score_function", "rope_type", "transformer_impl")
# what two ranks of one run cannot differ in; the model and its layout are compared as a whole
RUN = ("seed", "train_iters", "global_batch_size", "consumed_train_samples", "lr", "data_path", "tensor_model_parallel_size",
       "pipeline_model_parallel_size", "expert_model_parallel_size", "world_size")  # fmt: skip
NO_ARGS = "save it with Megatron-LM, which stores its args, or copy them from a save of the same run"
SAMPLE = 4096  # bytes of a shard that are looked at to tell it from another rank's
SPLIT = re.compile(r".*\.(linear_qkv|linear_proj|linear_q_proj|linear_kv_up_proj|linear_fc[12])\.weight")


def check_args(args: Mapping[str, Any] | None, where: str) -> Mapping[str, Any]:
    """The args, if every entry that says what the model is has its type and a value that can be one.

    Raises CheckpointError naming the entry.
    """
    if args is None:
        raise CheckpointError(
            "the checkpoint has no args, so nothing says what model it is", where=where, expected="args", hint=NO_ARGS
        )
    if strange := [name for name in args if not isinstance(name, str)]:
        raise _damaged(where, brief(strange[0]), "words as names", strange[0])
    _check_sizes(args, where)
    for name in NUMBERS:
        value = args.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value)):
            raise _damaged(where, name, "a number", value)
    for name in TEXTS:
        if not isinstance(args.get(name, ""), str | None):
            raise _damaged(where, name, "a word", args[name])
    for name in ("moe_layer_freq", "no_rope_freq"):
        if not _frequency(args.get(name)):
            raise _damaged(where, name, "an integer, or a list of them", args[name])
    window = args.get("window_size")
    if window is not None and not (isinstance(window, list | tuple) and all(type(item) is int for item in window)):
        raise _damaged(where, "window_size", "two integers", window)
    return args


def _check_sizes(args: Mapping[str, Any], where: str) -> None:
    """Sizes and counts are numbers that can be some, and fit each other."""
    for name in (*SIZES, *COUNTS):
        least, most = int(name in SIZES), MOST if name in LISTED else LARGEST
        value = args.get(name)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise _damaged(where, name, f"an integer from {least} to {most}", value)
    if (experts := args.get("num_experts")) and (args.get("moe_router_topk") or 0) > experts:
        raise _damaged(where, "moe_router_topk", f"at most {experts}, the number of experts", args["moe_router_topk"])
    heads, groups = args.get("num_attention_heads"), args.get("num_query_groups")
    if heads and groups and args.get("group_query_attention", True) and heads % groups:
        raise heads_and_groups(heads, groups, f"{where}: args: num_query_groups")


def _damaged(where: str, name: str, expected: str, value: object) -> CheckpointError:
    return CheckpointError(
        "the checkpoint's args are damaged",
        where=f"{where}: args: {name}",
        expected=expected,
        found=brief(value),
        hint=ARGS_WRONG,
    )


def _finite(value: float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST


def _frequency(value: object) -> bool:
    """Whether a layer frequency is one, and does not unfold to more layers than there can be."""
    if value is None or type(value) is int:
        return value is None or 0 < value <= MOST
    if isinstance(value, str):
        return len(value) <= MOST and sum(int(number[:10]) for number in re.findall(r"\d+", value)) <= MOST
    return isinstance(value, list | tuple) and len(value) <= MOST and all(item in (0, 1) for item in value)


def check_architecture(a: Architecture, where: str, keys: Mapping[str, str]) -> None:
    """Every size is a positive integer, and no other entry is of a kind that none can have. Raises CheckpointError.

    `keys` are the names that config.json has for the fields.
    """
    for name in ("num_layers", "hidden_size", "num_heads", "num_query_groups", "head_dim", "vocab_size"):
        value = getattr(a, name)
        if not (type(value) is int and 1 <= value <= LARGEST):
            raise no_model(f"{where}: {keys.get(name, name)}", "a positive integer", brief(value))
    for part in (a, a.rope, a.rope.scaling if a.rope else None, a.moe, a.mla):
        for name in part.__struct_fields__ if part is not None else ():
            value = getattr(part, name)
            good = value is None or isinstance(value, bool | str | Struct)
            good |= isinstance(value, int | float) and _finite(value)
            good |= isinstance(value, tuple) and all(
                isinstance(entry, int | float) and _finite(entry) for entry in value
            )
            if not good:
                raise no_model(f"{where}: {keys.get(name, name)}", "a number", brief(value))


def check_save(save: Iteration, iteration: object, version: object, where: str) -> None:
    """The save is the iteration that its directory is named after, and its rows are in an order that is known.

    Raises CheckpointError. Files from before checkpoint_version 2.0 have query, key and value in other orders
    (megatron/training/checkpointing.py, fix_query_key_value_ordering), and Megatron-LM takes an absent version for 0.
    """
    if save.iteration is not None and isinstance(iteration, int) and iteration != save.iteration:
        raise CheckpointError(
            "the save is of another iteration than its directory's name says", where=where,
            expected=f"iteration {save.iteration}", found=f"iteration {iteration}",
            hint=f"if the files are right, rename {save.directory.name} to {iteration_name(iteration)[:40]}",
        )  # fmt: skip
    if not isinstance(version, int | float) or not 2 <= version <= 3:
        raise CheckpointError(
            "the checkpoint_version is not supported", where=where, expected="3.0",
            found="none, which Megatron-LM takes for 0" if version is None else brief(version),
            hint="load it with Megatron-LM and save it again",
        )  # fmt: skip


def check_ranks(ranks: Ranks, args: Mapping[str, Any]) -> None:
    """The files belong to one save of one run, each to the rank that its folder is named after, none is there twice.

    Raises CheckpointError naming the file that does not.
    """
    first = ranks[min(ranks)]
    with located("args", f"{first.path}: args"):
        model = from_args(args)
    for file in ranks.values():
        theirs = check_args(file.args, file.path)
        with located("args", f"{file.path}: args"):
            differing = _differing(file, theirs, first, args, model)
        if differing:
            said = ", ".join(f"{name} {expected}" for name, expected, _ in differing[:5])
            raise CheckpointError(
                "the rank files are not of one save",
                where=file.path,
                expected=f"{said}, as in {first.path}",
                found=", ".join(f"{name} {found}" for name, _, found in differing[:5]),
                hint="copy all mp_rank folders from one save",
            )
    _check_places(ranks, args)
    _check_twins(ranks)


def _differing(
    file: RankFile, theirs: Mapping[str, Any], first: RankFile, args: Mapping[str, Any], model: Architecture
) -> list[tuple[str, str, str]]:
    """(name, value in the first file, value in this file) of what two files of one save cannot differ in."""
    if file is first:
        return []  # a NaN would differ from itself
    found = [("iteration", str(first.iteration), str(file.iteration))] if file.iteration != first.iteration else []
    if file.checkpoint_version != first.checkpoint_version:
        found.append(("checkpoint_version", str(first.checkpoint_version), str(file.checkpoint_version)))
    found += [(name, _value(args, name), _value(theirs, name)) for name in RUN if theirs.get(name) != args.get(name)]
    if found or theirs is args or from_args(theirs) == model:
        return found
    names = sorted(
        name for name in args.keys() | theirs.keys() if args.get(name) != theirs.get(name) and name != "rank"
    )
    return [(name, _value(args, name), _value(theirs, name)) for name in names]


def _value(args: Mapping[str, Any], name: str) -> str:
    return "not given" if args.get(name) is None else brief(args[name])


def _check_places(ranks: Ranks, args: Mapping[str, Any]) -> None:
    """The rank of the process that saved a file (Megatron-LM puts it into args) is one of its folder's name.

    Tensor parallel ranks follow each other, pipeline stages lie the furthest apart; with --use-tp-pp-dp-mapping data
    parallel ranks do (megatron-core parallel_state.py, order "tp-cp-ep-dp-pp" and "tp-cp-ep-pp-dp").
    """
    found_ranks = {rank: (file.args or {}).get("rank") for rank, file in ranks.items()}
    numbers = {rank: number for rank, number in found_ranks.items() if isinstance(number, int) and number >= 0}
    if len(ranks) < 2 or len(numbers) < len(ranks) or len(set(numbers.values())) == 1:
        return  # not told, or another tool's files: all with one rank's args
    tp, pp, world = (
        args.get(name) or 1 for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "world_size")
    )
    if world % (tp * pp):
        return
    apart = tp if args.get("use_tp_pp_dp_mapping") else world // pp
    for rank, number in numbers.items():
        found = (number % tp, number // apart % pp)
        if found != (rank.tp, rank.pp):
            raise CheckpointError(
                "a rank's file lies in the folder of another rank", where=ranks[rank].path,
                expected=f"the file of tp {rank.tp} pp {rank.pp}",
                found=f"that of tp {found[0]} pp {found[1]} (rank {number} of {world})",
                hint="rename the folders, or copy them again from the save",
            )  # fmt: skip


def _check_twins(ranks: Ranks) -> None:
    """No two tensor parallel ranks hold the same shard. Their split weights differ unless one is a copy of the other."""
    for rank, file in ranks.items():
        before = ranks.get(Rank(rank.tp - 1, rank.pp, rank.ep))
        if before is None:
            continue
        pairs = [
            (stored, theirs[name])
            for chunk, theirs in zip(file.chunks, before.chunks, strict=False)
            for name, stored in chunk.items()
            if SPLIT.fullmatch(name) and name in theirs
        ]
        samples = [(_sample(one), _sample(other)) for one, other in pairs[:8]]
        telling = [(one, other) for one, other in samples if len(set(one)) > 2]  # not constant
        if telling and all(one == other for one, other in telling):
            raise CheckpointError(
                "two ranks hold the same shards", where=file.path, expected="another part of each split weight",
                found=f"that of {before.path}", hint="one file was copied over the other: copy it again from the save",
            )  # fmt: skip


def _sample(stored: Stored) -> bytes:
    descriptor = open_file(stored.file)
    try:
        return os.pread(descriptor, min(SAMPLE, stored.nbytes), stored.offset)
    finally:
        os.close(descriptor)
