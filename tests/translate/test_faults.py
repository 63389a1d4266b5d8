"""The bugs of published scripts, planted into right translations: each changes the logits far more than rounding does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import edit_config, edit_tensors, logits, ratio

from commands import command, done
from shardtool import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
Tensors = dict[str, torch.Tensor]


def built(out: Path, name: str, **changes: object) -> Path:
    return tiny.build(json.loads((CONFIGS / f"{name}.json").read_text()) | changes, out)


def zeroed(*endings: str) -> Callable[[Tensors], object]:
    return lambda t: [value.zero_() for name, value in t.items() if name.endswith(endings)]


def thirds(t: Tensors) -> None:
    """qkv_proj cut into three equal parts, made to fit the shapes again."""
    for n in range(4):
        at = f"model.layers.{n}.self_attn."
        packed = torch.cat([t[at + f"{x}_proj.weight"] for x in "qkv"])
        for name, part in zip("qkv", packed.chunk(3), strict=True):
            rows = t[at + f"{name}_proj.weight"].shape[0]
            t[at + f"{name}_proj.weight"] = part.repeat(2, 1)[:rows].clone()


def rest_of_queries(q: torch.Tensor) -> torch.Tensor:
    """The rows of 4 heads of 16 that do not rotate, as a view: in each half of a head the last two of eight."""
    return q.view(4, 2, 8, -1)[:, :, 6:]


def read_config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


PHI4 = {
    "partial_rotary_factor": 0.75, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None,
    "original_max_position_embeddings": 64, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "attention_factor": 1.7,
    },
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.7}

FAULTS: dict[str, tuple[str, dict[str, object], str, Callable[[Path], object]]] = {
    "chunk(3) of a grouped qkv": (
        "phi3", {"sliding_window": None}, "llama", lambda out: edit_tensors(out, thirds)),
    "biases dropped": (
        "qwen2", {}, "llama", lambda out: edit_tensors(out, zeroed("q_proj.bias", "k_proj.bias", "v_proj.bias"))),
    "rope base forgotten": ("qwen2", {}, "llama", lambda out: edit_config(out, rope_theta=10000.0)),
    "rope scaling dropped": ("llama_linear", {}, "qwen2", lambda out: edit_config(out, rope_scaling=None)),
    "tied head ignored": ("qwen2_tied", {}, "llama", lambda out: (
        edit_config(out, tie_word_embeddings=False),
        edit_tensors(out, lambda t: t.update({"lm_head.weight": torch.randn_like(t["model.embed_tokens.weight"])})))),
    "embedding not scaled": ("gemma", {}, "llama", lambda out: edit_tensors(
        out, lambda t: t["model.embed_tokens.weight"].div_(8))),
    "gamma without the one": ("gemma", {}, "llama", lambda out: edit_tensors(
        out, lambda t: [v.sub_(1) for k, v in t.items() if k.endswith("norm.weight")])),
    "rows that stand still rotate": ("glm", {"rope_theta": 100.0}, "llama", lambda out: edit_config(
        out, rope_scaling=None)),
    "an attention factor on the rows that stand still": ("phi3", PHI4, "llama", lambda out: edit_tensors(
        out, lambda t: [rest_of_queries(v).mul_(1.7**2) for k, v in t.items() if k.endswith("q_proj.weight")])),
    "no attention factor at all": ("phi3", PHI4, "llama", lambda out: edit_config(
        out, rope_scaling=read_config(out)["rope_scaling"] | {"attention_factor": 1.0})),
    "the rows that stand still are not divided": ("glm", {"rope_scaling": YARN}, "llama", lambda out: edit_config(
        out, rope_scaling=read_config(out)["rope_scaling"] | {"attention_factor": 1.0})),
    "up without its bias": ("starcoder2", {"sliding_window": None}, "llama", lambda out: edit_tensors(
        out, zeroed("up_proj.bias"))),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_caught(fault: str, tmp_path: Path) -> None:
    name, changes, to, plant = FAULTS[fault]
    source = built(tmp_path / "in", name, **changes)
    if name == "starcoder2":
        edit_tensors(source, zeroed("model.norm.bias"))
    done("translate", source, tmp_path / "out", "--to", to, "-q")
    ours = logits(source, torch.float32)
    assert ratio(ours, logits(tmp_path / "out", torch.float32)) <= 1e-4
    plant(tmp_path / "out")
    assert ratio(ours, logits(tmp_path / "out", torch.float32)) > 1e-2


def test_mistral_has_no_place_for_biases(tmp_path: Path) -> None:
    """transformers' Mistral ignores attention_bias: a script that relied on it lost every bias."""
    source = built(tmp_path / "in", "qwen2")
    result = command("translate", source, tmp_path / "out", "--to", "mistral", "-q")
    assert result.code == 2
    assert "v_proj.bias is not 0 everywhere" in result.err
    assert not (tmp_path / "out").exists()
    edit_tensors(source, zeroed("q_proj.bias", "k_proj.bias", "v_proj.bias"))
    done("translate", source, tmp_path / "out", "--to", "mistral", "-q")
    assert torch.equal(logits(source, torch.float32), logits(tmp_path / "out", torch.float32))
