"""Checkpoints that cannot be compared, and manifests that cannot be checked."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import convert
from spoiled import Copied, Megatron, Refused, TinyModel, edit_config, edit_rank

LOGITS = ("--level", "logits", "--max-tokens", 12)
LAST = "decoder.final_layernorm.weight"


def test_nothing_to_compare(refused: Refused) -> None:
    refused(2, "verify", names=("A and B",))


def test_checksums_of_two_directories(megatron: Megatron, refused: Refused) -> None:
    refused(2, "verify", megatron("llama"), "--checksums", megatron("llama"), names=("--checksums",))


MANIFESTS: dict[str, tuple[int, Callable[[dict[str, Any]], object], str]] = {
    "of another version": (1, lambda m: m.update(shardtool_manifest=99), "99"),
    "without files": (1, lambda m: m.pop("files"), "files"),
    "that names a file outside": (1, lambda m: m["files"].update({"../x": {"size": 1}}), "../x"),
    "without checksums": (2, lambda m: [file.pop("sha256") for file in m["files"].values()], "no checksums"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest(case: str, megatron: Megatron, copied: Copied, refused: Refused) -> None:
    source = copied(megatron("llama"))
    path = source / "shardtool.json"
    code, change, name = MANIFESTS[case]
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    refused(code, "verify", "--checksums", source, names=(path, name))


def test_a_directory_without_a_manifest(tiny_model: TinyModel, refused: Refused) -> None:
    refused(2, "verify", "--checksums", tiny_model("llama"), names=("shardtool.json",))


def test_files_that_have_changed(megatron: Megatron, copied: Copied, refused: Refused) -> None:
    source = copied(megatron("llama"))
    (source / "latest_checkpointed_iteration.txt").write_text("500")
    refused(1, "verify", "--checksums", source, names=("latest_checkpointed_iteration.txt",), report=True)


def test_two_architectures_compared_tensor_by_tensor(tiny_model: TinyModel, refused: Refused) -> None:
    arguments = ("verify", tiny_model("llama"), tiny_model("gpt2"), "--level", "exact")
    refused(1, *arguments, names=("different tables",), report=True)


RANKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of another shape": (lambda c: c["model"].update({LAST: torch.ones(65)}), "do not fit the model"),
    "without a tensor": (lambda c: c["model"].pop(LAST), "different tensors"),
    "with a tensor under two names": (
        lambda c: c["model"].update({"decoder.layers.0.input_layernorm.weight": torch.ones(64)}), "under two names"
    ),
    "with too small an embedding": (lambda c: vars(c["args"]).update(vocab_size=500), "fewer rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", RANKS)
def test_the_logits_of_a_rank_file(
    case: str, tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused
) -> None:
    change, name = RANKS[case]
    source = edit_rank(copied(megatron("llama")), change)
    refused(1, "verify", tiny_model("llama"), source, *LOGITS, names=(name,), report=True)


def test_the_logits_of_a_rank_with_too_many_experts(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused
) -> None:
    name = "decoder.layers.0.mlp.experts.linear_fc1.weight"
    source = edit_rank(copied(megatron("mixtral")), lambda c: c["model"].update({f"{name}99": c["model"][f"{name}0"]}))
    refused(1, "verify", tiny_model("mixtral"), source, *LOGITS, names=("more experts than its share",), report=True)


def test_the_logits_of_a_torch_dist_checkpoint_without_a_tensor(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused
) -> None:
    source = copied(megatron("llama", "torch_dist"))
    path = source / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata[LAST]
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == LAST)]
    path.write_bytes(pickle.dumps(metadata))
    refused(1, "verify", tiny_model("llama"), source, *LOGITS, names=("cannot load",), report=True)


NOT_BUILT: dict[str, tuple[str, dict[str, Any], str]] = {
    "latent attention and neighbouring dims": ("deepseek_v3", {"rotary_interleaved": True}, "on neighbouring dims, yarn"),
    "latent attention and learned positions": (
        "deepseek_v3", {"position_embedding_type": "learned_absolute"}, "no rope"
    ),
    "groups that do not divide the experts": (
        "mixtral", {"moe_router_num_groups": 3, "moe_router_group_topk": 2}, "megatron-core refuses this model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_BUILT)
def test_the_logits_of_args_with(
    case: str, tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused
) -> None:
    family, changes, name = NOT_BUILT[case]
    source = edit_rank(copied(megatron(family)), lambda content: vars(content["args"]).update(changes))
    refused(2, "verify", tiny_model(family), source, *LOGITS, names=(name,))


def test_the_logits_of_a_model_that_megatron_core_computes_differently(
    tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    made = convert(tiny_model("olmoe"), tmp_path / "made", "--allow-inexact")
    refused(2, "verify", tiny_model("olmoe"), made, *LOGITS, names=("another function",))


def test_the_logits_of_a_model_in_the_dtype_of_none(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused
) -> None:
    source = edit_config(copied(tiny_model("llama")), torch_dtype="float64", dtype="float64")
    refused(2, "verify", source, megatron("llama"), *LOGITS, "--dtype", "native", names=("float64",))


def test_the_logits_of_a_directory_that_transformers_refuses(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused
) -> None:
    source = edit_config(copied(tiny_model("llama")), pad_token_id=10**6)
    refused(1, "verify", source, megatron("llama"), *LOGITS, names=("transformers cannot load", source), report=True)
