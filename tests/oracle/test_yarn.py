"""Yarn on plain attention, as Qwen's long contexts have it, in megatron-core: within the original length and beyond."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import command, convert, done
from faults import edit_args
from shardtool import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "qwen2": ("qwen2", YARN),
    "llama": ("llama", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
    "qwen3_moe": ("qwen3_moe", {**YARN, "factor": 2.0, "truncate": False}),
    "with mscale": ("mistral_nemo", {**YARN, "mscale": 2.0, "mscale_all_dim": 0.7}),
}


def built(name: str, out: Path) -> Path:
    family, scaling = CASES[name]
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    return tiny.build(config | {"rope_scaling": scaling}, out)


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_there_and_back(name: str, tmp_path: Path) -> None:
    model = built(name, tmp_path / "model")
    result = done("hf2megatron", model, tmp_path / "megatron", "--tp", 2, "--pp", 2, "-q", "--json").json
    assert any("flags for yarn" in note for note in result["notes"])
    report = done("verify", model, tmp_path / "megatron", "--json", "-q").json
    assert report["levels"][-1]["ratio"] <= 1e-4
    assert "--yarn-original-max-position-embeddings 64" in done("args", tmp_path / "megatron").out
    done("megatron2hf", tmp_path / "megatron", tmp_path / "back", "-q")
    assert tiny.differences(model, tmp_path / "back")[1] == []
    done("verify", tmp_path / "back", tmp_path / "megatron", "-q")
    done("megatron2hf", tmp_path / "megatron", tmp_path / "given", "--hf", model, "-q")


FAULTS: dict[str, Callable[[Path], None]] = {
    "another factor": lambda m: edit_args(m, yarn_rotary_scaling_factor=2.0, rotary_scaling_factor=2.0),
    "another original length": lambda m: edit_args(m, yarn_original_max_position_embeddings=256),
    "no yarn": lambda m: edit_args(m, position_embedding_type="rope"),
    "no concentration": lambda m: edit_args(m, yarn_mscale_all_dim=1.0, mscale_all_dim=1.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, tmp_path: Path) -> None:
    model = built("qwen2", tmp_path / "model")
    megatron = convert(model, tmp_path / "megatron", "--format", "torch")
    FAULTS[fault](megatron)
    assert command("verify", model, megatron, "--level", "logits", "-q").code == 1


def test_translated_first(tmp_path: Path) -> None:
    model = built("qwen2", tmp_path / "model")
    done("translate", model, tmp_path / "llama", "--to", "llama", "-q")
    megatron = convert(tmp_path / "llama", tmp_path / "megatron")
    done("verify", model, megatron, "--level", "logits", "-q")
