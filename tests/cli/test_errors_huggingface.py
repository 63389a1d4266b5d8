"""Hugging Face directories that are wrong: one error with the file and the tensor, exit 1, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import builds
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
    "yarn that lacks the length it was trained with": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, ("cannot be converted", "original_max")
    ),
    "biases on some linears": ({"mlp_bias": True}, ("cannot be converted", "attention_bias", "mlp_bias")),
    "an unknown activation": ({"hidden_act": "quick_gelu"}, ("cannot be converted", "hidden_act", "quick_gelu")),
    "quantised weights": ({"quantization_config": {"quant_method": "awq"}}, ("cannot be converted", "quantised", "awq")),
    "a word for a number": ({"num_hidden_layers": "four"}, ("num_hidden_layers",)),
    "a negative size": ({"hidden_size": -64}, ("hidden_size",)),
    "heads that do not divide into groups": ({"num_key_value_heads": 3}, ("num_key_value_heads",)),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, ("describes no model",)),
    "a list for a number": ({"attention_dropout": [1]}, ("describes no model", "attention_dropout")),
    "one size that no other fits": ({"num_attention_heads": 0}, ("config.json",)),
    "an activation that Megatron's args cannot say": (
        {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "hidden_act": "relu"}, ("cannot be converted", "relu")
    ),
    "a rope that rotates a part of each head": (
        {"partial_rotary_factor": 0.5, "rope_parameters": None}, ("cannot be converted", "rotates whole heads")
    ),
    "llama3 rope scaling with constants of its own": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}, "rope_parameters": None},
        ("cannot be converted", "fixes them"),
    ),
    "rope scaling that lacks its factor": (
        {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": None}, ("cannot be converted", "'factor' is missing")
    ),
    "a rope type that megatron-core does not have": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None}, ("cannot be converted", "dynamic")
    ),
    "entries of unknown kinds": ({"rope_scaling": 7}, ("describes no model",)),
    "an epsilon that is a list": ({"rms_norm_eps": [1]}, ("describes no model", "norm_eps")),
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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LATENT = {
    "with an attention_factor of its own": ({**YARN, "attention_factor": 1.2}, "attention_factor"),
    "without truncate": ({**YARN, "truncate": False}, "truncate"),
}


@pytest.mark.parametrize("case", LATENT)
def test_yarn_on_latent_attention(
    case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    scaling, name = LATENT[case]
    source = edit_config(copied(tiny_model("deepseek_v3")), rope_scaling=scaling, rope_parameters=None)
    refused(2, "hf2megatron", source, tmp_path / "dst", names=("cannot be converted", name))


def test_yarn_where_rope_pairs_neighbours(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_config(copied(tiny_model("glm")), rope_scaling=YARN, rope_parameters=None)
    refused(2, "hf2megatron", source, tmp_path / "dst", names=("cannot be converted", "yarn on"))


def test_a_sliding_window_on_some_layers_of_mimo(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
    source = edit_config(copied(tiny_model("qwen2")), model_type="mimo", architectures=["MiMoForCausalLM"], **window)
    refused(2, "hf2megatron", source, tmp_path / "dst", names=("cannot be converted", "prediction layers"))


def test_output_biases_that_are_not_zero(refused: Refused, tmp_path: Path) -> None:
    tiny.build(json.loads(CONFIG.read_text()) | {"attention_bias": True}, tmp_path / "source")
    names = ("model.layers.{0-3}.self_attn.o_proj.bias",)
    refused(1, "hf2megatron", tmp_path / "source", tmp_path / "dst", names=names)


def test_names_on_disk_that_a_family_does_not_have(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    for to, names in (("llama", ("one set of names",)), ("mixtral", ("per-expert or fused",))):
        source = tiny_model(to)
        refused(2, "translate", source, tmp_path / "dst", "--to", to, "--dialect", "packed", names=names)


AUTO_MAPS = {"is a number": (7, "cannot be read"), "leads out": ("../outside.Tokenizer", "no module beside it")}


@pytest.mark.parametrize("case", AUTO_MAPS)
def test_a_tokenizer_with_an_auto_map_that(
    case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    value, name = AUTO_MAPS[case]
    source = copied(tiny_model("llama"))
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": value}}))
    refused(1, "translate", source, tmp_path / "dst", "--to", "qwen2", names=(name,))


def test_a_number_that_no_float_holds(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    text = (source / "config.json").read_text()
    assert '"rms_norm_eps": 1e-05' in text
    (source / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e999'))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("config.json: rms_norm_eps", "inf"))


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


QUANTISED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "is there quantised and not": (
        {"x_blocks": (2, 4, 1, 16), "x_scales": (2, 4, 1), "x": (2, 32, 4)}, "both quantised and not"
    ),
    "has blocks and scales that do not fit": ({"x_blocks": (2, 4, 1, 16), "x_scales": (2, 3, 1)}, "do not fit each other"),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTISED)
def test_an_mxfp4_tensor_that(
    case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    shapes, name = QUANTISED[case]
    added = {tensor: torch.ones(shape, dtype=torch.uint8) for tensor, shape in shapes.items()}
    source = edit(copied(tiny_model("llama")), lambda tensors: tensors.update(added))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source, ": x", name))


FP8 = "model.layers.1.self_attn.o_proj.weight"


def one_dim(tensors: Tensors) -> None:
    tensors[FP8] = tensors[FP8].view(torch.uint8).reshape(-1).view(torch.float8_e4m3fn)


EIGHT: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "without its scales": (lambda t: t.pop(FP8 + "_scale_inv"), "no scales"),
    "with scales of another shape": (lambda t: t.update({FP8 + "_scale_inv": torch.ones(1, 1)}), "do not fit"),
    "that is no matrix": (one_dim, "a way that is not known"),
}


@pytest.mark.parametrize("case", EIGHT)
def test_an_fp8_tensor(case: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    change, name = EIGHT[case]
    source = edit(builds.quantise(tiny_model("deepseek_v3"), tmp_path / "source"), change)
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source, FP8, name))


def test_fp8_tensors_without_the_size_of_a_block(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    source = builds.quantise(tiny_model("deepseek_v3"), tmp_path / "source")
    edit_config(source, quantization_config={"quant_method": "fp8"})
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("weight_block_size",))


BINS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "that holds a list": (lambda t: list(t.values()), "holds no state dict"),
    "with a number among the tensors": (lambda t: {**t, "step": 7}, "no tensor"),
}


@pytest.mark.parametrize("case", BINS)
def test_a_pytorch_model_bin(
    case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    change, name = BINS[case]
    source = copied(tiny_model("llama"))
    torch.save(change(load_file(source / "model.safetensors")), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("pytorch_model.bin", name))


def test_far_fewer_tensors_than_the_config_says(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_config(copied(tiny_model("mixtral")), num_local_experts=90_000, num_hidden_layers=9)
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source, "far more tensors"))


BAICHUAN2 = {
    "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "vocab_size": 128, "hidden_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "z_loss_weight": 0,
}  # fmt: skip


def test_a_head_whose_rows_are_divided_by_their_norm_and_lie_in_columns(refused: Refused, tmp_path: Path) -> None:
    source, at = tmp_path / "source", "model.layers.0."
    source.mkdir()
    (source / "config.json").write_text(json.dumps(BAICHUAN2))
    shapes = {
        "model.embed_tokens.weight": (128, 64), "lm_head.weight": (64, 128), "model.norm.weight": (64,),
        at + "input_layernorm.weight": (64,), at + "post_attention_layernorm.weight": (64,),
        at + "self_attn.W_pack.weight": (192, 64), at + "self_attn.o_proj.weight": (64, 64),
        at + "mlp.gate_proj.weight": (96, 64), at + "mlp.up_proj.weight": (96, 64), at + "mlp.down_proj.weight": (64, 96),
    }  # fmt: skip
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    torch.save({**tensors, "lm_head.weight": tensors["lm_head.weight"].T}, source / "pytorch_model.bin")
    names = (source / "pytorch_model.bin", "not stored row by row")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=names)
