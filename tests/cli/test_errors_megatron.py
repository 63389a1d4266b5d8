"""Megatron checkpoints that are wrong: one error with the file and the tensor, exit 1, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command
from spoiled import RANK_FILE, Copied, Megatron, Refused, TinyModel, edit_config, edit_rank


def test_a_missing_rank(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 2))
    (source / "release" / "mp_rank_01_001" / RANK_FILE).unlink()
    for command_name in ("megatron2hf", "reshard"):
        refused(1, command_name, source, tmp_path / "dst", names=("mp_rank_01_001",))
    (source / "release" / "mp_rank_01_001").rmdir()
    for command_name in ("megatron2hf", "reshard"):
        refused(1, command_name, source, tmp_path / "dst", names=("tp 1 pp 1",))


def test_a_missing_or_truncated_file_of_torch_dist(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch_dist", "te", 2, 2))
    path = source / "release" / "__2_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("__2_0.distcp",))
    path.unlink()
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("__2_0.distcp",))


def test_a_tracker_that_names_nothing(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    (source / "latest_checkpointed_iteration.txt").write_text("500")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("iter_0000500", "release"))
    (source / "latest_checkpointed_iteration.txt").write_text("soon")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("soon",))


def test_a_save_that_was_cut_off(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    (source / "release" / "metadata.json").unlink()
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("metadata.json",))


def test_differing_norms_over_tp(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    name = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    source = copied(megatron("llama", "torch", "te", 2, 1))
    edit_rank(source, lambda content: content["model"][name][5].add_(1), "mp_rank_01")
    names = ("copies of the same weights differ", name, "mp_rank_01", "1 of 64 elements")
    for arguments in (("megatron2hf",), ("reshard",), ("reshard", "--tp", 2)):
        refused(1, arguments[0], source, tmp_path / "dst", *arguments[1:], names=names)
    assert command("verify", megatron("llama"), source, "--level", "exact", "-q").code == 1
    assert command("verify", source, megatron("llama"), "--level", "exact", "-q").code == 1


def test_a_differing_copy_of_tied_embeddings(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("qwen2_tied", "torch", "te", 1, 2))
    edit_rank(source, lambda content: content["model"]["output_layer.weight"][3].neg_(), "mp_rank_00_001")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("output_layer.weight", "64 of 7680 elements differ"))


def test_tensors_that_are_missing_extra_or_of_a_wrong_shape(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    def spoil(content: dict[str, Any]) -> None:
        model = content["model"]
        for layer in range(4):
            del model[f"decoder.layers.{layer}.mlp.linear_fc2.weight"]
            model[f"decoder.layers.{layer}.self_attention.linear_proj.weight"] = torch.ones(64, 60)
        model["stray"] = torch.ones(3)

    source = edit_rank(copied(megatron("llama")), spoil)
    names = (
        "4 missing, 1 not known, 4 of a wrong shape",
        "missing: decoder.layers.{0-3}.mlp.linear_fc2.weight",
        "not known to this architecture: stray",
        "wrong shape: decoder.layers.{0-3}.self_attention.linear_proj.weight",
    )
    refused(1, "megatron2hf", source, tmp_path / "dst", names=names)
    result = refused(1, "inspect", source, names=names)
    assert "Megatron torch" in result.out


def test_a_stage_without_its_layers(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        for key in [key for key in content["model"] if key.startswith("decoder.layers.1.")]:
            del content["model"][key]

    source = edit_rank(copied(megatron("llama", "torch", "te", 1, 2)), spoil, "mp_rank_00_001")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("4 layers", "3 (stage 0: 2, stage 1: 1)"))


def test_ranks_of_different_saves(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 1))
    edit_rank(source, lambda content: content.update(iteration=200), "mp_rank_01")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("not of one save", "mp_rank_01", "200"))


def test_args_are_missing(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = edit_rank(copied(megatron("llama")), lambda content: content.pop("args"))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("no args", RANK_FILE))
    shutil.rmtree(source)
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    common = torch.load(source / "release" / "common.pt", weights_only=False)
    del common["args"]
    torch.save(common, source / "release" / "common.pt")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("no args", "release"))


ARGS: dict[str, tuple[int, dict[str, object], tuple[str, ...]]] = {
    "without num_layers": (1, {"num_layers": None}, ("num_layers",)),
    "with a word for a number": (1, {"num_layers": "four"}, ("num_layers",)),
    "with more layers than there are": (1, {"num_layers": 6}, ("6 layers", "4")),
    "with another hidden size": (1, {"hidden_size": 128}, ("expected", "found")),
    "with heads that do not divide into groups": (1, {"num_query_groups": 3}, ("query groups",)),
    "of a hybrid model": (1, {"hybrid_override_pattern": "M*M*"}, ("hybrid",)),
    "with a window that is not causal": (1, {"window_size": (4, 4)}, ("window_size",)),
    "with an unknown position embedding": (1, {"position_embedding_type": "relative"}, ("relative",)),
    "with a larger vocabulary than the embedding": (1, {"vocab_size": 500}, ("500", "128")),
    "that no Hugging Face architecture fits": (2, {"rotary_interleaved": True}, ("interleaved",)),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGS)
def test_args(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    code, changes, names = ARGS[case]
    source = edit_rank(copied(megatron("llama")), lambda content: vars(content["args"]).update(changes))
    refused(code, "megatron2hf", source, tmp_path / "dst", names=names)


def test_a_model_from_before_megatron_core(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    nested = {"language_model": {"embedding": {"word_embeddings": {"weight": torch.ones(4, 4)}}, "encoder": {}}}
    source = edit_rank(copied(megatron("llama")), lambda content: content.update(model=nested))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("before megatron-core", RANK_FILE))


OTHERS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "with another rope base": ({"rope_theta": 500000.0, "rope_parameters": None}, ("rope",)),
    "with another epsilon": ({"rms_norm_eps": 1e-6}, ("norm_eps: 1e-05 and 1e-06",)),
    "with another vocabulary": ({"vocab_size": 121}, ("vocab_size: 120 and 121",)),
    "with fewer layers": ({"num_hidden_layers": 3}, ("num_layers: 4 and 3",)),
    "with tied embeddings": ({"tie_word_embeddings": True}, ("tied: False and True",)),
    "of another architecture": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        ("qkv_bias: False and True",),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_hf_is_a_config(case: str, tiny_model: TinyModel, megatron: Megatron, refused: Refused, tmp_path: Path) -> None:
    changes, names = OTHERS[case]
    other = edit_config(shutil.copytree(tiny_model("llama"), tmp_path / "other"), **changes)
    arguments = ("megatron2hf", megatron("llama"), tmp_path / "dst", "--hf", other)
    refused(1, *arguments, names=("different models", other, *names))


def test_hf_that_is_no_model(megatron: Megatron, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given in (tmp_path / "empty", tmp_path / "nothing"):
        refused(2, "megatron2hf", megatron("llama"), tmp_path / "dst", "--hf", given, names=("config.json", given))
