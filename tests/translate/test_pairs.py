"""Each pair in transformers: the verdict, and the logits of the source and of what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import TOKENS, edit_tensors, logits, ratio, same_bits, tensors, typical

from commands import command, done
from shardtool import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
MINI = {"partial_rotary_factor": 0.75, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
# Phi-4-mini: longrope, whose attention factor is on the part of each head that rotates
PHI4 = MINI | {
    "original_max_position_embeddings": 64, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    },
}  # fmt: skip
STRONG = PHI4 | {"rope_scaling": {**PHI4["rope_scaling"], "attention_factor": 1.7}}
SHORT_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SHORT_LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 64}

OLMO = {"model_type": "olmo", "architectures": ["OlmoForCausalLM"], "clip_qkv": None, "tie_word_embeddings": True}

# source in configs/tiny, changes to its config, target, verdict, verdict within the condition, tokens
PAIRS: list[tuple[str, dict[str, Any], str, str, str, int]] = [
    ("qwen2", {}, "llama", "identical", "identical", TOKENS),
    ("qwen2_tied", {}, "llama", "identical", "identical", TOKENS),
    ("qwen2", {"rope_scaling": YARN}, "llama", "identical", "identical", 100),
    ("mistral_nemo", {}, "llama", "identical", "identical", TOKENS),
    ("mistral", {}, "llama", "conditional", "identical", 8),
    ("phi3", {}, "llama", "conditional", "identical", 64),
    ("phi3", {"sliding_window": None, "original_max_position_embeddings": 64, "rope_scaling": LONGROPE}, "llama",
     "identical", "identical", 100),
    ("phi3", MINI, "llama", "exact", "exact", TOKENS),
    ("phi3", PHI4, "llama", "exact", "exact", 64),
    ("phi3", PHI4, "llama", "exact", "exact", 100),
    ("phi3", STRONG, "qwen2", "exact", "exact", 100),
    ("glm", {"rope_scaling": SHORT_YARN}, "llama", "exact", "exact", 100),
    ("glm", {"rope_scaling": SHORT_LLAMA3}, "llama", "exact", "exact", 100),
    ("glm", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "llama", "exact", "exact", TOKENS),
    ("stablelm", {"rope_scaling": {**SHORT_YARN, "attention_factor": 1.5}}, "llama", "exact", "exact", 100),
    ("seed_oss", {}, "llama", "identical", "identical", TOKENS),
    ("glm", {}, "llama", "exact", "exact", TOKENS),
    ("ernie4_5", {}, "llama", "exact", "exact", TOKENS),
    ("stablelm", {}, "llama", "exact", "exact", TOKENS),
    ("starcoder2", {}, "llama", "conditional", "exact", 8),
    ("llama", {}, "qwen2", "identical", "identical", TOKENS),
    ("llama3", {"rope_scaling": LLAMA3}, "qwen2", "identical", "identical", 100),
    ("llama_linear", {}, "mistral", "identical", "identical", TOKENS),
    ("llama_tied", {}, "phi3", "identical", "identical", TOKENS),
    ("gemma", {}, "llama", "exact", "exact", TOKENS),
    ("gemma_untied", {}, "llama", "exact", "exact", TOKENS),
    ("granite", {}, "llama", "exact", "exact", TOKENS),
    ("gpt_neox", {}, "llama", "exact", "exact", TOKENS),
    ("nemotron", {}, "llama", "exact", "exact", TOKENS),
    ("llama", OLMO, "llama", "exact", "exact", TOKENS),
    # not in any list of ours: derived from the tables
    ("llama", {}, "glm", "exact", "exact", TOKENS),
    ("llama", {}, "gemma", "exact", "exact", TOKENS),
    ("llama_tied", {}, "granite", "identical", "identical", TOKENS),
    ("granite", {}, "qwen2", "exact", "exact", TOKENS),
    ("granitemoe", {}, "mixtral", "exact", "exact", TOKENS),
    ("mixtral", {"sliding_window": None}, "granitemoe", "exact", "exact", TOKENS),
    ("qwen3_next", {}, "qwen3_5_moe_text", "exact", "exact", TOKENS),
    ("qwen3_5_moe", {}, "qwen3_next", "exact", "exact", TOKENS),
    ("mistral", {}, "qwen2", "identical", "identical", TOKENS),
    ("stablelm", {}, "ernie4_5", "exact", "exact", TOKENS),
    ("phi3", {"sliding_window": None}, "seed_oss", "identical", "identical", TOKENS),
]  # fmt: skip
EXPERTS = ("granitemoe", "mixtral", "qwen3_next", "qwen3_5_moe")
ZERO_FINAL_BIAS = {
    "stablelm": "model.norm.bias",
    "starcoder2": "model.norm.bias",
    "nemotron": "model.norm.bias",
    "gpt_neox": "gpt_neox.final_layer_norm.bias",
}  # the condition on their weights

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build("phi3", sliding_window=None)` is that tiny model. Read it, do not change it."""
    root = tmp_path_factory.mktemp("translate")
    made: dict[str, Path] = {}

    def get(name: str, **changes: object) -> Path:
        key = json.dumps([name, changes])
        if key not in made:
            config = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
            made[key] = tiny.build(config, root / f"{name}-{len(made)}")
            if name in ZERO_FINAL_BIAS:
                edit_tensors(made[key], lambda t: t[ZERO_FINAL_BIAS[name]].zero_())
        return made[key]

    return get


@pytest.mark.parametrize(("name", "changes", "to", "level", "within", "tokens"), PAIRS)
def test_pair(
    name: str, changes: dict[str, Any], to: str, level: str, within: str, tokens: int, build: Build, tmp_path: Path
) -> None:
    source = build(name, **changes)
    verdict = done("translate", source, tmp_path / "out", "--to", to, "-q", "--json").json["verdict"]
    assert (verdict["level"], verdict["within"]) == (level, within)
    ours, theirs = (logits(place, torch.float32, tokens) for place in (source, tmp_path / "out"))
    low, other = (logits(place, torch.bfloat16, tokens) for place in (source, tmp_path / "out"))
    if within == "identical":
        assert torch.equal(ours, theirs)
        assert torch.equal(low, other)
    else:
        assert ratio(ours, theirs) <= 1e-4
        # the noise of the model itself: what rounding to bf16 does to it
        apart = typical if name in EXPERTS else ratio
        assert apart(low, other) <= 4 * apart(ours, low)


def test_the_condition_is_in_the_config_and_holds_no_further(build: Build, tmp_path: Path) -> None:
    source = build("mistral")
    done("translate", source, tmp_path / "out", "--to", "llama", "-q")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 8
    ours, theirs = (logits(place, torch.float32) for place in (source, tmp_path / "out"))
    assert torch.equal(ours[:, :8], theirs[:, :8])
    assert ratio(ours, theirs) > 0.1  # a window that is ignored beyond its length


@pytest.mark.parametrize(
    ("name", "changes", "to", "reason"),
    [
        ("qwen3", {}, "llama", "qk-norm"),
        ("llama", {}, "qwen3", "qk-norm"),
        ("mixtral", {}, "llama", "experts"),
        ("llama", {}, "mixtral", "no experts"),
        ("smollm3", {}, "llama", "per-layer rope"),
        ("gpt2", {}, "llama", "learned positions"),
        ("moonlight", {}, "llama", "latent attention"),
        ("qwen2", {}, "mistral", "q_proj.bias is not 0 everywhere"),
        ("llama", {}, "starcoder2", "RMSNorm"),
        ("starcoder2", {}, "mistral", "needs a bias of 1"),
        ("llama3", {}, "internlm2", "rope scaling llama3"),
        ("llama", {}, "chatglm", "rotates 0.5 of it"),
        ("glm", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "llama", "no fixed numbers"),
    ],
)
def test_impossible(name: str, changes: dict[str, Any], to: str, reason: str, build: Build, tmp_path: Path) -> None:
    result = command("translate", build(name, **changes), tmp_path / "out", "--to", to, "-q", "--json")
    assert result.code == 2
    assert not (tmp_path / "out").exists()
    assert result.json["verdict"]["level"] == "impossible"
    assert any(reason in line for line in result.json["verdict"]["reasons"])


def test_the_final_bias_of_a_layer_norm_must_be_zero(build: Build, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(build("stablelm"), tmp_path / "in")
    edit_tensors(tmp_path / "in", lambda t: t["model.norm.bias"].add_(1))
    result = command("translate", tmp_path / "in", tmp_path / "out", "--to", "llama", "-q")
    assert result.code == 2
    assert "model.norm.bias is not 0 everywhere" in result.err


@pytest.mark.parametrize(
    ("name", "changes", "by_way_of"),
    [
        ("qwen2", {}, "llama"),
        ("qwen2_tied", {}, "llama"),
        ("llama", {}, "qwen2"),
        ("llama", {}, "glm"),
        ("llama_tied", {}, "phi3"),
        ("ernie4_5", {}, "llama"),
        ("mistral_nemo", {}, "ernie4_5"),
        ("phi3", {"sliding_window": None}, "internlm2"),
    ],
)
def test_round_trip(name: str, changes: dict[str, Any], by_way_of: str, build: Build, tmp_path: Path) -> None:
    source = build(name, **changes)
    family = json.loads((source / "config.json").read_text())["model_type"]
    done("translate", source, tmp_path / "there", "--to", by_way_of, "-q")
    done("translate", tmp_path / "there", tmp_path / "back", "--to", family, "-q")
    assert same_bits(tensors(source), tensors(tmp_path / "back"))
    assert torch.equal(logits(source, torch.float32), logits(tmp_path / "back", torch.float32))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_an_architecture_with_experts_is_itself(name: str, build: Build, tmp_path: Path) -> None:
    """config.json as transformers 5 writes it, or as the hub has it; the tensors stay."""
    source = build(name)
    family = json.loads((source / "config.json").read_text())["model_type"]
    verdict = done("translate", source, tmp_path / "out", "--to", family, "-q", "--json").json["verdict"]
    assert verdict["level"] == "identical"
    assert same_bits(tensors(source), tensors(tmp_path / "out"))
    assert torch.equal(logits(source, torch.float32), logits(tmp_path / "out", torch.float32))
