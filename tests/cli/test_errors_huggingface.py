"""Hugging Face directories that are wrong: one error with the file and the tensor, exit 1, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands import convert
from shardtool import tiny
from spoiled import CONFIG, Copied, Refused, Tensors, TinyModel, edit, edit_config


def test_an_unknown_architecture_names_the_known_ones(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_config(copied(tiny_model("llama")), model_type="acorn", architectures=["AcornForCausalLM"])
    names = ("unknown architecture", "acorn", "gpt2", "llama", "mistral", "qwen2", "qwen3")
    refused(2, "hf2megatron", source, tmp_path / "dst", names=names)


def test_what_megatron_core_cannot_express_is_refused_with_the_reason(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_config(copied(tiny_model("llama")), model_type="bloom", architectures=["BloomForCausalLM"])
    refused(2, "hf2megatron", source, tmp_path / "dst", names=("bloom", "ALiBi"))


CONFIGS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "a rope type that megatron-core does not have": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, ("cannot be converted", "yarn")
    ),
    "biases on some linears": ({"attention_bias": True}, ("cannot be converted", "attention_bias")),
    "an unknown activation": ({"hidden_act": "quick_gelu"}, ("cannot be converted", "hidden_act", "quick_gelu")),
    "quantised weights": ({"quantization_config": {"quant_method": "awq"}}, ("cannot be converted", "quantised", "awq")),
    "a word for a number": ({"num_hidden_layers": "four"}, ("num_hidden_layers",)),
    "a negative size": ({"hidden_size": -64}, ("hidden_size",)),
    "heads that do not divide into groups": ({"num_key_value_heads": 3}, ("num_key_value_heads",)),
    "a list for the number of groups": ({"num_key_value_heads": [1]}, ("num_key_value_heads",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_with(case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    changes, names = CONFIGS[case]
    source = edit_config(copied(tiny_model("llama")), **changes)
    refused(
        2 if "cannot be converted" in names else 1,
        "hf2megatron",
        source,
        tmp_path / "dst",
        names=(source / "config.json", *names),
    )


def test_a_broken_config(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    (source / "config.json").write_text('{"model_type": "llama"')
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("config.json",))
    (source / "config.json").unlink()
    refused(1, "inspect", source, names=("config",))


def test_a_missing_tensor(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    source = edit(copied(tiny_model("llama")), lambda tensors: tensors.pop(name))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("1 missing", f"missing: {name}", source))


def test_an_extra_tensor(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = edit(copied(tiny_model("llama")), lambda tensors: tensors.update(stray=torch.ones(3)))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("not known to this architecture: stray",))


def test_all_that_is_wrong_with_the_tensors_in_one_run(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        for layer in range(4):
            tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.ones(60, 64)
            tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.ones(64)
        for layer in (0, 1, 3):
            del tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(65)

    source = edit(copied(tiny_model("llama")), spoil)
    names = (
        "3 missing, 4 not known, 5 of a wrong shape",
        "missing: model.layers.{0-1,3}.mlp.down_proj.weight",
        "not known to this architecture: model.layers.{0-3}.self_attn.q_proj.bias",
        "wrong shape: model.layers.{0-3}.self_attn.q_proj.weight: expected [64, 64], found [60, 64]",
        "wrong shape: model.norm.weight: expected [64], found [65]",
    )
    result = refused(1, "hf2megatron", source, tmp_path / "dst", names=names)
    assert len(result.err.splitlines()) == 9


CUTS = {"before its header": 4, "in its header": 2000, "at the start of its header": 40, "in its last tensor": -1}


@pytest.mark.parametrize("case", CUTS)
def test_a_safetensors_file_that_is_cut_off(
    case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[: CUTS[case]])
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("model.safetensors",))


def test_a_missing_shard_of_an_index(refused: Refused, tmp_path: Path) -> None:
    source = tiny.build(json.loads(CONFIG.read_text()), tmp_path / "source", max_shard_size="100KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(shard.name,))


def test_mixed_dtypes(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    source = edit(copied(tiny_model("llama")), lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    names = ("dtypes", source, f"{name}: bfloat16", "float32", "--dtype")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=names)
    convert(source, tmp_path / "dst", "--dtype", "fp32")


def test_a_tied_model_with_a_head_on_disk(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("qwen2_tied"))
    edit(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    convert(source, tmp_path / "equal", "--format", "torch")
    edit(source, lambda tensors: tensors["lm_head.weight"][7].add_(1))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("lm_head.weight", "64 of 7680 elements differ"))
