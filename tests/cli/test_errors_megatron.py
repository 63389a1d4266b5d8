"""Megatron checkpoints that are wrong: one error with the file and the tensor, exit 1, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command, convert
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
    "with an attention that is not known": (1, {"experimental_attention_variant": "mamba"}, ("mamba",)),
    "with a softmax that is not known": (1, {"softmax_type": "off-by-one"}, ("off-by-one",)),
    "that name a family which is not known": (2, {"hf_model_type": "acorn"}, ("acorn",)),
    "that name a family which cannot say them": (2, {"hf_model_type": "gpt2"}, ("gpt2",)),
    "with entries of shardtool that are damaged": (1, {"hf_folded": {"x": 1}}, ("hf_folded",)),
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
    "with another epsilon": ({"rms_norm_eps": 1e-6}, ("epsilon of the norms: 1e-05 and 1e-06",)),
    "with another vocabulary": ({"vocab_size": 121}, ("vocabulary: 120 and 121",)),
    "with fewer layers": ({"num_hidden_layers": 3}, ("layers: 4 and 3",)),
    "with tied embeddings": ({"tie_word_embeddings": True}, ("tied embeddings: no and yes",)),
    "of another architecture": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        ("biases of q, k and v: no and yes",),
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


EXPERT_ARGS: dict[str, tuple[dict[str, object], str]] = {
    "of other lengths than the layers": ({"moe_layer_freq": [1, 0]}, "does not fit the layers"),
    "that is no list": ({"moe_layer_freq": "one,two"}, "cannot be read"),
}


@pytest.mark.parametrize("case", EXPERT_ARGS)
def test_args_with_a_layer_frequency(
    case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    changes, name = EXPERT_ARGS[case]
    source = edit_rank(copied(megatron("mixtral")), lambda content: vars(content["args"]).update(changes))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, name))


FILES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "without a model": (lambda c: c.pop("model"), "no whole Megatron model"),
    "with a list for the model": (lambda c: c.update(model=[1, 2]), "no state dict"),
    "with a number among the tensors": (lambda c: c["model"].update(step=7), "no plain tensor"),
    "without an embedding": (lambda c: c["model"].pop("embedding.word_embeddings.weight"), "no input embedding"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_rank_file(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    change, name = FILES[case]
    source = edit_rank(copied(megatron("llama")), change)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, name))


def test_a_rank_file_that_holds_a_list(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    torch.save([1, 2], source / "release" / "mp_rank_00" / RANK_FILE)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "no Megatron checkpoint"))


def test_folders_of_two_forms(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 2))
    (source / "release" / "mp_rank_01_001").rename(source / "release" / "mp_rank_01")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(source / "release", "no set of Megatron ranks"))


def test_folders_of_the_same_rank(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    shutil.copytree(source / "release" / "mp_rank_00", source / "release" / "mp_rank_000")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(source / "release", "the same rank"))


def test_a_folder_whose_name_lacks_a_number(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    made = convert(tiny_model("mixtral"), tmp_path / "made", "--pp", 2, "--ep", 2, "--format", "torch")
    source = copied(made)
    for folder in list((source / "release").iterdir()):
        if folder.name.endswith("_000"):
            folder.rename(folder.with_name(folder.name.removesuffix("_000")))
        elif folder.is_dir():
            shutil.rmtree(folder)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("lacks a number", source))


def test_shards_of_experts_that_are_missing(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    """The args say that the experts are split further than there are files."""
    options = ("--tp", 2, "--ep", 2, "--etp", 1, "--format", "torch")
    source = copied(convert(tiny_model("mixtral"), tmp_path / "made", *options))

    def split_further(content: dict[str, Any]) -> None:
        args = vars(content["args"])
        args.update(expert_tensor_parallel_size=2, moe_ffn_hidden_size=2 * args["moe_ffn_hidden_size"])

    for rank in ("mp_rank_00_000", "mp_rank_01_001"):
        edit_rank(source, split_further, rank)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("shards of the experts are missing", source))


def test_a_torch_dist_checkpoint_of_another_shape_than_its_args(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch_dist"))
    common = torch.load(source / "release" / "common.pt", weights_only=False)
    common["args"].num_layers = 6
    torch.save(common, source / "release" / "common.pt")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("of a wrong shape", "expected [6"))


def test_args_of_another_model_than_the_tensors(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_rank(copied(megatron("qwen2")), lambda content: vars(content["args"]).update(add_qkv_bias=False))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("another model than its tensors",))


def test_a_layer_that_is_applied_twice_which_no_hugging_face_model_has(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_rank(
        copied(megatron("deepseek_v3")),
        lambda content: vars(content["args"]).update(mtp_use_repeated_layer=True, mtp_num_layers=2),
    )
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("no Hugging Face architecture is this model",))


def test_a_fused_down_projection_that_cannot_be_cut(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    """The query rank is odd, and two ranks have half of the rows each: no megatron-core has saved it."""
    at = "decoder.layers.0.self_attention."

    def odd(content: dict[str, Any]) -> None:
        model = content["model"]
        model[at + "linear_q_up_proj.weight"] = model[at + "linear_q_up_proj.weight"][:, :-1].clone()
        model[at + "linear_qkv_down_proj.weight"] = model.pop(at + "linear_q_down_proj.weight")[:1].clone()

    source = edit_rank(copied(megatron("deepseek_v3", "torch", "te", 2, 1)), odd)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(at + "linear_qkv_down_proj.weight", "mp_rank_00"))
