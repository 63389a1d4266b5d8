"""Ranks that do not belong together, args that cannot be, and hostile torch_dist checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from shardtool.formats.inert import brief
from spoiled import RANK_FILE, Copied, Megatron, Refused, edit_rank

EXCHANGED = {
    "tensor parallel ranks": ("mp_rank_00_000", "mp_rank_01_000"),
    "pipeline stages": ("mp_rank_00_000", "mp_rank_00_001"),
    "tensor parallel ranks of the second stage": ("mp_rank_00_001", "mp_rank_01_001"),
}


@pytest.mark.parametrize("case", EXCHANGED)
def test_exchanged(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 2))
    one, other = (source / "release" / name for name in EXCHANGED[case])
    one.rename(source / "aside")
    other.rename(one)
    (source / "aside").rename(other)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("in the folder of another rank", one.name))


def test_a_rank_copied_over_another(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 1))
    first, second = (source / "release" / name / RANK_FILE for name in ("mp_rank_00", "mp_rank_01"))
    for rank in ("mp_rank_00", "mp_rank_01"):  # as by a tool that does not write the rank
        edit_rank(source, lambda content: vars(content["args"]).pop("rank"), rank)
    shutil.copyfile(first, second)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("the same shards", "mp_rank_01", "mp_rank_00"))


RUNS: dict[str, tuple[str, Any]] = {
    "epsilon": ("norm_epsilon", 1e-6),
    "seed": ("seed", 7),
    "rope base": ("rotary_base", 5000),
    "world size": ("world_size", 64),
}


@pytest.mark.parametrize("case", RUNS)
def test_one_rank_of_a_run_with_another(
    case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    name, value = RUNS[case]
    source = copied(megatron("llama", "torch", "te", 2, 1))
    edit_rank(source, lambda content: vars(content["args"]).update({name: value}), "mp_rank_01")
    refused(1, "reshard", source, tmp_path / "dst", names=("not of one save", "mp_rank_01", name, brief(value)))


def test_another_iteration_than_the_directory(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    for form in ("torch", "torch_dist"):
        source = copied(megatron("llama", form))
        (source / "release").rename(source / "iter_0000500")
        (source / "latest_checkpointed_iteration.txt").write_text("500")
        refused(1, "megatron2hf", source, tmp_path / "dst", names=("iteration 500", "iteration 0"))
        shutil.rmtree(source)


def test_a_rank_with_a_weight_of_another_dtype(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 1))
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    edit_rank(source, lambda content: content["model"].update({name: content["model"][name].bfloat16()}), "mp_rank_01")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(name, f"mp_rank_01/{RANK_FILE}", "bfloat16"))


VERSIONS = {"is missing": None, "is 0": 0, "is 1.0": 1.0, "is NaN": float("nan"), "is a word": "3.0"}


@pytest.mark.parametrize("case", VERSIONS)
def test_the_checkpoint_version(
    case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama"))
    edit_rank(source, lambda content: content.update(checkpoint_version=VERSIONS[case]))
    found = {"is missing": "none, which", "is a word": "'3.0'", "is NaN": "nan"}.get(case, str(VERSIONS[case]))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("checkpoint_version", RANK_FILE, f"found: {found}"))


DAMAGED: dict[str, tuple[str, Any]] = {
    "a billion layers": ("num_layers", 10**9),
    "a word for the number of experts": ("num_experts", "8"),
    "NaN for a number": ("norm_epsilon", float("nan")),
    "a number for a word": ("normalization", 3),
    "a list for a number": ("rotary_base", []),
    "a layer frequency that unfolds to a billion": ("moe_layer_freq", "([1]*1000000000)"),
    "a word for the window": ("window_size", "ab"),
    "a negative size": ("kv_channels", -8),
    "a number for the position embedding": ("position_embedding_type", 3),
    "a number for a name": (7.5, 1),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_args_with(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    name, value = DAMAGED[case]
    source = copied(megatron("llama"))
    edit_rank(source, lambda content: vars(content["args"]).update({name: value}))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("args are damaged", name, RANK_FILE))


def test_args_that_choose_more_experts_than_there_are(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_rank(copied(megatron("mixtral")), lambda content: setattr(content["args"], "moe_router_topk", 99))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "moe_router_topk", "at most 8"))


def test_a_rank_that_is_a_link(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "leads out"))
