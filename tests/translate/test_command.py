"""The command: its output, its dry run, what it carries over, and the way on to Megatron."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measure import edit_config, same_bits, tensors
from safetensors.torch import load_file

from commands import command, convert, done
from shardtool import tiny

TinyModel = Callable[[str], Path]
ROOT = Path(__file__).parents[2]


def test_the_dry_run_writes_nothing_and_says_the_same(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("qwen2_tied")
    dry = done("plan", "translate", source, tmp_path / "out", "--to", "llama", "--json").json
    told = done("translate", source, "--to", "llama", "--explain", "--json").json
    assert not (tmp_path / "out").exists()
    real = done("translate", source, tmp_path / "out", "--to", "llama", "-q", "--json").json
    assert dry["verdict"] == told["verdict"] == real["verdict"]
    manifest = json.loads((tmp_path / "out" / "shardtool.json").read_text())
    assert manifest["verdict"] == real["verdict"]
    assert "--to llama" in manifest["command"]
    assert dry["digest"] == real["plan_digest"]
    assert dry["bytes_written"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    text = done("plan", "translate", source, "--to", "llama").out
    assert "model.layers.{0-3}.self_attn.o_proj.bias" in text
    assert "0 everywhere" in text


def test_companions_and_token_ids_are_carried(tiny_model: TinyModel, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_model("llama"), tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    done("translate", tmp_path / "in", tmp_path / "out", "--to", "qwen2", "-q")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((tmp_path / "in" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert [config[key] for key in ("bos_token_id", "eos_token_id")] == [
        before[key] for key in ("bos_token_id", "eos_token_id")
    ]


def test_usage_errors(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert "DST is missing" in command("translate", model, "--to", "qwen2").err
    assert "does not know" in command("translate", model, tmp_path / "out", "--to", "gpt5").err
    edit = tmp_path / "falcon"
    edit.mkdir()
    (edit / "config.json").write_text('{"model_type": "falcon"}')
    result = command("translate", edit, tmp_path / "out", "--to", "llama", "--json")
    assert result.code == 2
    assert "parallel residual" in result.json["verdict"]["reasons"][0]


def test_folded_tensors_can_stay_wide(tmp_path: Path) -> None:
    source = tiny.build(ROOT / "configs" / "tiny" / "granite.json", tmp_path / "in", dtype="bfloat16")
    done("translate", source, tmp_path / "out", "--to", "llama", "--fold-dtype", "fp32", "-q")
    found = tensors(tmp_path / "out")
    wide = {name for name, value in found.items() if value.dtype == torch.float32}
    assert "model.embed_tokens.weight" in wide
    assert "model.layers.0.self_attn.q_proj.weight" in wide
    assert found["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert found["lm_head.weight"].dtype == torch.bfloat16
    before = tensors(source)["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], before.float() * 12)
    assert torch.equal(found["lm_head.weight"], before)


def test_several_files_and_threads_give_the_same_tensors(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("glm")
    done("translate", source, tmp_path / "one", "--to", "llama", "-q", "--jobs", 1)
    done("translate", source, tmp_path / "many", "--to", "llama", "-q", "--jobs", 4, "--max-shard-size", "100KB")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert same_bits(tensors(tmp_path / "one"), found)


@pytest.mark.parametrize(
    ("name", "changes", "to"),
    [("mistral_nemo", {}, "llama"), ("phi3", {"sliding_window": None}, "llama"), ("llama", {}, "mistral"),
     ("llama_tied", {}, "phi3"), ("granite", {"attention_multiplier": 8**-0.5}, "llama")],
)  # fmt: skip
def test_the_way_on_to_megatron(name: str, changes: dict[str, object], to: str, tmp_path: Path) -> None:
    """translate, then hf2megatron: the tensors of the direct conversion, bit for bit."""
    config = json.loads((ROOT / "configs" / "tiny" / f"{name}.json").read_text()) | changes
    source = tiny.build(config, tmp_path / "in", dtype="bfloat16")
    done("translate", source, tmp_path / "out", "--to", to, "-q")
    direct, way = (
        convert(model, tmp_path / f"megatron-{number}", "--format", "torch", "--tp", 2)
        for number, model in enumerate((source, tmp_path / "out"))
    )
    for file in direct.glob("release/*/model_optim_rng.pt"):
        ours = torch.load(file, weights_only=False)["model"]
        theirs = torch.load(way / file.relative_to(direct), weights_only=False)["model"]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if isinstance(ours[key], torch.Tensor))


def test_smollm2_as_qwen2_and_back(smollm2_dir: Path, tmp_path: Path) -> None:
    done("translate", smollm2_dir, tmp_path / "qwen2", "--to", "qwen2", "-q")
    done("translate", tmp_path / "qwen2", tmp_path / "back", "--to", "llama", "-q")
    assert tiny.differences(smollm2_dir, tmp_path / "back") == (272, [])
    answers = [tiny.answer(folder, max_new_tokens=8) for folder in (smollm2_dir, tmp_path / "qwen2", tmp_path / "back")]
    assert answers[0] == answers[1] == answers[2]
    assert "Paris" in answers[0][1]


def test_the_page_is_what_the_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "translate-table"))
    assert script["main"](["--check"]) == 0


def test_head_that_differs_from_the_embedding_it_is_tied_to(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A Gemma that was a Llama: its one tensor must give both of the Llama's."""
    done("translate", tiny_model("gemma"), tmp_path / "llama", "--to", "llama", "-q")
    done("translate", tmp_path / "llama", tmp_path / "back", "--to", "gemma", "-q")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    edit_config(tmp_path / "llama", tie_word_embeddings=True)
    assert command("translate", tmp_path / "llama", tmp_path / "again", "--to", "qwen2", "-q").code == 1
