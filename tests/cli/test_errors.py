"""Bad input: one clear message, exit 1 (the checkpoint is wrong) or 2 (the request is), and nothing left behind.

Then what looks odd and is right: old spellings, buffers, recipes, casts, padding.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from commands import Result, command, convert, done
from shardtool import tiny

TinyModel = Callable[[str], Path]
Megatron = Callable[..., Path]
RANK_FILE = "model_optim_rng.pt"
Tensors = dict[str, torch.Tensor]


Refused = Callable[..., Result]
Copied = Callable[[Path], Path]


def edit(model: Path, change: Callable[[Tensors], object]) -> Path:
    """Change the tensors of a Hugging Face directory."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def edit_config(model: Path, **changes: object) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model


def edit_rank(checkpoint: Path, change: Callable[[dict[str, Any]], object], rank: str = "mp_rank_00") -> Path:
    """Change what a rank's file holds."""
    (path,) = checkpoint.glob(f"*/{rank}/{RANK_FILE}")
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    return checkpoint


# --- requests that make no sense -------------------------------------------------------------------------------------


def test_tp_that_does_not_divide(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--tp", 3, names=("tp 3", "divide"))


def test_tp_beyond_the_heads(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--tp", 16, names=("tp 16",))


def test_layers_that_do_not_divide(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    names = ("4 layers", "3 pipeline stages", "--first-stage-layers")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--pp", 3, names=names)


@pytest.mark.parametrize("command_name", ["hf2megatron", "plan hf2megatron"])
def test_a_dry_run_refuses_the_same(command_name: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, *command_name.split(), tiny_model("llama"), tmp_path / "dst", "--tp", 3, names=("divide",))


def test_experts_of_a_dense_model(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--ep", 2, names=("--ep",))


def test_virtual_stages_without_a_pipeline(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--vpp", 2, names=("virtual",), hint=False)


def test_a_pipeline_layout_that_is_none(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    layout = ("--pp", 2, "--pipeline-layout", "Etx|tL")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", *layout, names=("layout", "x"), hint=False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--memory-budget", "lots"), ("--memory-budget", "1kB"), ("--memory-budget", "0"), ("--jobs", "0"),
        ("--jobs", "two"), ("--tp", "0"), ("--tp", "-1"), ("--pp", "x"), ("--format", "zarr"), ("--spec", "fused"),
        ("--dtype", "int8"), ("--vocab-pad", "ones"), ("--vocab-divisible-by", "0"), ("--nonsense", "1"),
    ],
)  # fmt: skip
def test_bad_options(option: str, value: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    hint = option != "--memory-budget"
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", option, value, names=(option,), hint=hint)


@pytest.mark.parametrize("value", ["", "big", "5XB", "-5GB", "0"])
def test_bad_shard_sizes(value: str, megatron: Megatron, refused: Refused, tmp_path: Path) -> None:
    arguments = ("megatron2hf", megatron("llama"), tmp_path / "dst", "--max-shard-size", value)
    refused(2, *arguments, names=("--max-shard-size",), hint=False)


def test_a_missing_argument_and_an_unknown_command(refused: Refused) -> None:
    refused(2, "hf2megatron", names=("SRC",))
    refused(2, "convert", names=("convert",))


def test_an_unknown_level(tiny_model: TinyModel, refused: Refused) -> None:
    model = tiny_model("llama")
    refused(2, "verify", model, model, "--level", "all", names=("accounting, exact, logits",), hint=False)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tp = ", ("cannot be read",)),
        ("tensor_parallel = 2\nvpp = 1\n", ("unknown entries", "tensor_parallel", "tp")),
        ('tp = "many"\n', ("--tp",)),
        ("tp = 0\n", ("--tp",)),
        ('format = "zarr"\n', ("--format", "zarr")),
        ("[tp]\nsize = 2\n", ("--tp",)),
        (None, ("cannot be read", "recipe.toml")),
    ],
)
def test_bad_recipes(
    text: str | None, names: tuple[str, ...], tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    if text is not None:
        recipe.write_text(text)
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--config", recipe, names=names, hint=False)


# --- places ----------------------------------------------------------------------------------------------------------


def test_dst_exists(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=(tmp_path / "dst", "--overwrite"))


def test_dst_is_a_file(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "dst").write_text("precious")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--overwrite", names=("not a directory",))
    assert (tmp_path / "dst").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_dst_and_src_inside_each_other(
    overwrite: tuple[str, ...], tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    for dst in (source, source / "megatron", source / "a" / ".." / "megatron", source.parent):
        refused(2, "hf2megatron", source, dst, *overwrite, names=("overlap", dst))
    (tmp_path / "link").symlink_to(source)
    refused(2, "hf2megatron", source, tmp_path / "link" / "megatron", *overwrite, names=("overlap",))


def test_dst_that_cannot_be_made(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "file" / "dst", names=("file/dst",), hint=False)


def test_src_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tmp_path / "nothing", tmp_path / "dst", names=(tmp_path / "nothing",))


@pytest.mark.parametrize("arguments", [("inspect",), ("args",), ("megatron2hf", "DST"), ("reshard", "DST")])
def test_not_a_checkpoint(arguments: tuple[str, ...], refused: Refused, tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "README.md").write_text("nothing here")
    dst = (tmp_path / "dst",) if "DST" in arguments else ()
    for source in (empty, other, other / "README.md"):
        refused(1, arguments[0], source, *dst, names=(source,), hint=False)


def test_a_hub_id_that_cannot_be_reached(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    arguments = [sys.executable, "-m", "shardtool", "hf2megatron", "nobody/nothing", str(tmp_path / "dst"), "-q"]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "nobody/nothing" in result.stderr
    assert "hint: give a local directory" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "dst").exists()


# --- Hugging Face directories that are wrong -------------------------------------------------------------------------


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
    refused(2, "hf2megatron", source, tmp_path / "dst", names=("bloom", "ALiBi"), hint=False)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, ("original_max",)),
        ({"mlp_bias": True}, ("attention_bias", "mlp_bias")),
        ({"hidden_act": "quick_gelu"}, ("hidden_act", "quick_gelu")),
        ({"quantization_config": {"quant_method": "awq"}}, ("quantised", "awq")),
        ({"num_hidden_layers": "four"}, ("num_hidden_layers",)),
        ({"hidden_size": -64}, ("hidden_size",)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads",)),
    ],
)
def test_a_config_that_cannot_be_converted(
    changes: dict[str, object], names: tuple[str, ...],
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path,
) -> None:  # fmt: skip
    source = edit_config(copied(tiny_model("llama")), **changes)
    refused(2, "hf2megatron", source, tmp_path / "dst", names=names, hint=False)


def test_a_broken_config(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    (source / "config.json").write_text('{"model_type": "llama"')
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("config.json",), hint=False)
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


@pytest.mark.parametrize("keep", [4, 40, 2000, -1])
def test_a_truncated_safetensors_file(
    keep: int, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("model.safetensors",), hint=False)


def test_a_missing_shard_of_an_index(refused: Refused, tmp_path: Path) -> None:
    source = tiny.build(json.loads(CONFIG.read_text()), tmp_path / "source", max_shard_size="100KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(shard.name,), hint=False)


CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "llama.json"


def test_mixed_dtypes(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    source = edit(copied(tiny_model("llama")), lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    names = ("dtypes", "linear_qkv.weight", "bfloat16", "float32", "--dtype")
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


# --- Megatron checkpoints that are wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("command_name", ["megatron2hf", "reshard"])
def test_a_missing_rank(
    command_name: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 2))
    (source / "release" / "mp_rank_01_001" / RANK_FILE).unlink()
    refused(1, command_name, source, tmp_path / "dst", names=("mp_rank_01_001",), hint=False)
    (source / "release" / "mp_rank_01_001").rmdir()
    refused(1, command_name, source, tmp_path / "dst", names=("tp 1 pp 1",))


def test_a_missing_or_truncated_file_of_torch_dist(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch_dist", "te", 2, 2))
    path = source / "release" / "__2_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("__2_0.distcp",))
    path.unlink()
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("__2_0.distcp",), hint=False)


def test_a_tracker_that_names_nothing(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    (source / "latest_checkpointed_iteration.txt").write_text("500")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("iter_0000500", "release"))
    (source / "latest_checkpointed_iteration.txt").write_text("soon")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("soon",), hint=False)


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
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("4 layers", "3 (stage 0: 2, stage 1: 1)"), hint=False)


def test_ranks_of_different_saves(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 1))
    edit_rank(source, lambda content: content.update(iteration=200), "mp_rank_01")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("not of one save", "mp_rank_01", "200"), hint=False)


def test_args_are_missing(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = edit_rank(copied(megatron("llama")), lambda content: content.pop("args"))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("no args", RANK_FILE), hint=False)
    shutil.rmtree(source)
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    common = torch.load(source / "release" / "common.pt", weights_only=False)
    del common["args"]
    torch.save(common, source / "release" / "common.pt")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("no args", "release"), hint=False)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_layers": None}, ("num_layers",)),
        ({"num_layers": "four"}, ("num_layers",)),
        ({"num_layers": 6}, ("6 layers", "4")),
        ({"hidden_size": 128}, ("expected", "found")),
        ({"num_query_groups": 3}, ("query groups",)),
        ({"hybrid_override_pattern": "M*M*"}, ("hybrid",)),
        ({"window_size": (4, 4)}, ("window_size",)),
        ({"position_embedding_type": "relative"}, ("relative",)),
        ({"vocab_size": 500}, ("500", "128")),
        ({"rotary_interleaved": True}, ("interleaved",)),
    ],
)
def test_args_that_do_not_fit(
    changes: dict[str, object], names: tuple[str, ...],
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path,
) -> None:  # fmt: skip
    source = edit_rank(copied(megatron("llama")), lambda content: vars(content["args"]).update(changes))
    result = command("megatron2hf", source, tmp_path / "dst", "-q")
    refused(result.code, "megatron2hf", source, tmp_path / "dst", names=names, hint=False)
    assert result.code in (1, 2)


def test_a_model_from_before_megatron_core(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    nested = {"language_model": {"embedding": {"word_embeddings": {"weight": torch.ones(4, 4)}}, "encoder": {}}}
    source = edit_rank(copied(megatron("llama")), lambda content: content.update(model=nested))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("before megatron-core", RANK_FILE))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rope_theta": 500000.0, "rope_parameters": None}, ("rope",)),
        ({"rms_norm_eps": 1e-6}, ("norm_eps: 1e-05 and 1e-06",)),
        ({"vocab_size": 121}, ("vocab_size: 120 and 121",)),
        ({"num_hidden_layers": 3}, ("num_layers: 4 and 3",)),
        ({"tie_word_embeddings": True}, ("tied: False and True",)),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, ("qkv_bias: False and True",)),
    ],
)
def test_a_hugging_face_config_of_another_model(
    changes: dict[str, object], names: tuple[str, ...],
    tiny_model: TinyModel, megatron: Megatron, refused: Refused, tmp_path: Path,
) -> None:  # fmt: skip
    other = shutil.copytree(tiny_model("llama"), tmp_path / "other")
    edit_config(other, **changes)
    arguments = ("megatron2hf", megatron("llama"), tmp_path / "dst", "--hf", other)
    refused(1, *arguments, names=("different models", other, *names))


def test_hf_that_is_no_model(megatron: Megatron, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given in (tmp_path / "empty", tmp_path / "nothing"):
        refused(2, "megatron2hf", megatron("llama"), tmp_path / "dst", "--hf", given, names=("config.json", given))


# --- pickles ---------------------------------------------------------------------------------------------------------


class Malicious:
    """Pickles to a call of os.system, which leaves a file behind if anybody makes it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("place", ["common.pt", ".metadata", RANK_FILE, "pytorch_model.bin"])
def test_nothing_in_a_checkpoint_is_executed(
    place: str, tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    canary = tmp_path / "executed"
    if place == "pytorch_model.bin":
        source = copied(tiny_model("llama"))
        tensors = load_file(source / "model.safetensors")
        (source / "model.safetensors").unlink()
        torch.save({**tensors, "evil": Malicious(canary)}, source / place)
        convert_it: tuple[object, ...] = ("hf2megatron", source, tmp_path / "dst")
    else:
        source = copied(megatron("llama", "torch" if place == RANK_FILE else "torch_dist", "te", 1, 1))
        convert_it = ("megatron2hf", source, tmp_path / "dst")
        if place == ".metadata":
            metadata = pickle.loads((source / "release" / place).read_bytes())
            metadata.planner_data = Malicious(canary)
            (source / "release" / place).write_bytes(pickle.dumps(metadata))
        else:
            (path,) = source.glob(f"release/**/{place}")
            content = torch.load(path, weights_only=False)
            content["args"].evil = Malicious(canary)
            torch.save(content, path)
    for arguments in (convert_it, ("inspect", source), ("verify", tiny_model("llama"), source)):
        refused(1, *arguments, names=("system", place), hint=False)
    assert not canary.exists()


# --- --json ----------------------------------------------------------------------------------------------------------


def test_errors_are_json_on_stdout(tiny_model: TinyModel, copied: Copied, tmp_path: Path) -> None:
    source = edit(copied(tiny_model("llama")), lambda tensors: tensors.pop("model.norm.weight"))
    result = command("hf2megatron", source, tmp_path / "dst", "--json")
    assert result.code == 1
    assert result.json["error"] == "checkpoint"
    assert result.json["details"] == ["missing: model.norm.weight"]
    assert result.json["where"] == str(source)
    assert "error: " in result.err
    result = command("hf2megatron", source, tmp_path / "dst", "--tp", "zero", "--json")
    assert result.code == 2
    assert result.json["error"] == "usage"
    assert "--tp" in result.json["what"]


def test_an_inspection_with_a_problem_is_one_json_document(tiny_model: TinyModel, copied: Copied) -> None:
    source = copied(tiny_model("llama"))
    megatron = convert(source, source.with_name("megatron"), "--format", "torch")
    edit_rank(megatron, lambda content: content["model"].pop("decoder.final_layernorm.weight"))
    result = command("inspect", megatron, "--json")
    assert result.code == 1
    assert result.json["problem"]["details"] == [f"missing: decoder.final_layernorm.weight in mp_rank_00/{RANK_FILE}"]
    assert result.json["format"] == "Megatron torch"
    assert result.err.startswith("error: ")


# --- what is right ---------------------------------------------------------------------------------------------------


def test_recipes_give_options_and_options_override_them(
    tiny_model: TinyModel, megatron: Megatron, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('tp = 2\npp = 2\nformat = "torch"\nspec = "local"\nvocab-pad = "last"\noverwrite = true\n')
    model, dst = tiny_model("llama"), tmp_path / "dst"
    dst.mkdir()
    convert(model, dst, "--config", recipe)
    assert done("inspect", dst, "--json").json["layout"] == {"tp": 2, "pp": 2, "vpp": 1, "ep": 1}
    convert(model, dst, "--pp", 1, "--config", recipe, "--vocab-pad", "zeros", "--spec", "te")
    same = megatron("llama", "torch", "te", 2, 1)
    for path in sorted(same.rglob("*.pt")):
        assert (dst / path.relative_to(same)).read_bytes() == path.read_bytes()


def test_overwrite_replaces_all_of_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    convert(tiny_model("llama"), dst, "--format", "torch", "--tp", 2)
    convert(tiny_model("llama"), dst, "--format", "torch_dist", "--overwrite")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dst"]
    assert sorted(entry.name for entry in (dst / "release").iterdir()) == [
        ".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json"
    ]  # fmt: skip


def test_a_failure_leaves_what_was_there(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    dst = convert(tiny_model("llama"), tmp_path / "dst", "--format", "torch")
    before = {path: path.read_bytes() for path in dst.rglob("*") if path.is_file()}
    source = copied(megatron("llama", "torch", "te", 2, 1))
    name = "decoder.final_layernorm.weight"
    edit_rank(source, lambda content: content["model"][name].add_(1), "mp_rank_01")
    refused(1, "reshard", source, dst, "--overwrite", names=(name,))
    assert {path: path.read_bytes() for path in dst.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("option", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_casts_are_those_of_torch(
    option: str, dtype: torch.dtype, form: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    megatron = convert(model, tmp_path / "megatron", "--dtype", option, "--format", form, "--tp", 2)
    done("megatron2hf", megatron, tmp_path / "back", "-q")
    expected, found = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    done("megatron2hf", megatron, tmp_path / "wide", "--dtype", "fp32", "-q")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(wide[name], tensor.to(dtype).float()) for name, tensor in expected.items())
    report = done("verify", tmp_path / "back", megatron, "--dtype", "native", "--max-tokens", 40, "--json", "-q").json
    assert report["levels"][-1]["dtype"] == option


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pad", ["zeros", "mean", "last"])
def test_padding_rows(pad: str, tp: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    megatron = convert(model, tmp_path / "megatron", "--vocab-pad", pad, "--tp", tp, "--format", "torch")
    shards = [torch.load(path, weights_only=False)["model"] for path in sorted(megatron.glob(f"release/*/{RANK_FILE}"))]
    tensors = load_file(model / "model.safetensors")
    for ours, theirs in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        stored, table = torch.cat([shard[ours] for shard in shards]), tensors[theirs]
        assert stored.shape == (128 * tp, 64)
        assert torch.equal(stored[:120], table)
        rows = {"zeros": torch.zeros(64), "mean": table.double().mean(0).float(), "last": table[-1]}[pad]
        assert torch.allclose(stored[120:], rows.expand(128 * tp - 120, 64), atol=1e-7)
        if pad != "mean":
            assert torch.equal(stored[120:], rows.expand(128 * tp - 120, 64))
    result = done("megatron2hf", megatron, tmp_path / "back")
    assert "note: " not in result.out


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_trained_padding_rows_are_mentioned(form: str, megatron: Megatron, copied: Copied, tmp_path: Path) -> None:
    def train(content: dict[str, Any]) -> None:
        content["model"]["output_layer.weight"][121:] = torch.randn(7, 64)

    source = edit_rank(copied(megatron("llama")), train)
    done("reshard", source, tmp_path / form, "--format", form, "-q")
    result = done("megatron2hf", tmp_path / form, tmp_path / "back")
    assert "8 padding rows of output_layer.weight were cut" in result.out
    assert "word_embeddings" not in result.out


def test_small_shards_make_an_index_that_transformers_loads(
    tiny_model: TinyModel, megatron: Megatron, tmp_path: Path
) -> None:
    back, model = tmp_path / "back", tiny_model("llama")
    done("megatron2hf", megatron("llama"), back, "--max-shard-size", "100kB", "-q")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(back.glob("model-*.safetensors"))
    assert len(files) >= 4
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    expected = load_file(model / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 100_000  # noqa: SIM118 - not a mapping
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (back, model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    convert(back, tmp_path / "again", "--format", "torch")
    same = megatron("llama") / "release" / "mp_rank_00" / RANK_FILE
    assert (tmp_path / "again" / "release" / "mp_rank_00" / RANK_FILE).read_bytes() == same.read_bytes()


def assert_converts_like(model: str, source: Path, megatron: Megatron, tmp_path: Path) -> None:
    """Byte for byte what the model's own directory gives."""
    convert(source, tmp_path / "dst", "--format", "torch")
    same = megatron(model) / "release" / "mp_rank_00" / RANK_FILE
    assert (tmp_path / "dst" / "release" / "mp_rank_00" / RANK_FILE).read_bytes() == same.read_bytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files(shards: int, tiny_model: TinyModel, megatron: Megatron, copied: Copied, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[:10], "pytorch_model-00002-of-00002.bin": names[10:]}
        for file, held in parts.items():
            torch.save({name: tensors[name] for name in held}, source / file)
        index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_converts_like("llama", source, megatron, tmp_path)


def test_old_gpt2_files(tiny_model: TinyModel, megatron: Megatron, copied: Copied, tmp_path: Path) -> None:
    """Without the `transformer.` prefix, with the causal mask as a buffer, with the tied head."""
    source = copied(tiny_model("gpt2"))
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(source / "model.safetensors").items()
    }
    for layer in range(4):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(256, 256).tril()[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_converts_like("gpt2", source, megatron, tmp_path)


def test_inv_freq_buffers(tiny_model: TinyModel, megatron: Megatron, copied: Copied, tmp_path: Path) -> None:
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    source = edit(copied(tiny_model("llama")), lambda tensors: tensors.update(buffers))
    assert_converts_like("llama", source, megatron, tmp_path)
    assert done("inspect", source, "--json").json["ignored"] == 4


def test_old_buffers_and_a_run_of_training(megatron: Megatron, copied: Copied, tmp_path: Path) -> None:
    """Beside the weights: a rope buffer, an optimizer, random states, args of other classes."""

    def add(content: dict[str, Any]) -> None:
        content["model"]["rotary_pos_emb.inv_freq"] = torch.ones(4)
        content["optimizer"] = {"optimizer": {"state": {0: torch.ones(3)}}}
        content["rng_state"] = [{"random_rng_state": (3, (1, 2), None)}]
        content["args"].save = Path("/checkpoints")
        content["args"].inner = Namespace(depth=2)

    source = edit_rank(copied(megatron("llama")), add)
    result = done("megatron2hf", source, tmp_path / "back")
    assert "left behind: optimizer, rng_state" in result.out
    done("verify", tmp_path / "back", megatron("llama"), "--level", "exact", "-q")
    facts = done("inspect", source, "--json").json
    assert facts["beside_the_model"] == ["optimizer", "rng_state"]


def test_hf_may_be_a_config_file(tiny_model: TinyModel, megatron: Megatron, tmp_path: Path) -> None:
    done("megatron2hf", megatron("llama"), tmp_path / "back", "--hf", tiny_model("llama") / "config.json", "-q")
    assert not (tmp_path / "back" / "generation_config.json").exists()
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "back", tiny_model("llama")))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_vocab_size_in_args_hf_gives_it(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, tmp_path: Path
) -> None:
    source = edit_rank(copied(megatron("llama")), lambda content: vars(content["args"]).update(vocab_size=None))
    result = done("megatron2hf", source, tmp_path / "all")
    assert "all 128 stored rows are exported" in result.out
    assert json.loads((tmp_path / "all" / "config.json").read_text())["vocab_size"] == 128
    done("megatron2hf", source, tmp_path / "true", "--hf", tiny_model("llama"), "-q")
    assert load_file(tmp_path / "true" / "model.safetensors")["lm_head.weight"].shape == (120, 64)
    done("verify", tiny_model("llama"), source, "--max-tokens", 40, "-q")
