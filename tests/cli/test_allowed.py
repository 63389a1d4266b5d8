"""What looks odd and is right: old spellings, buffers, recipes, casts, padding."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from commands import convert, done
from spoiled import RANK_FILE, Copied, Megatron, Refused, TinyModel, edit, edit_rank


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
