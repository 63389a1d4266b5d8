"""The families beside the core ones: round trip bit-identical, real megatron-core against transformers, a fault each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import command, convert, done
from faults import edit_args, edit_tensors

FAMILIES = [
    "phi3",
    "glm",
    "seed_oss",
    "smollm3",
    "ernie4_5",
    "stablelm",
    "starcoder2",
    "deepseek_v2_lite",
    "opt",
    "gpt_neox",
]
LAYOUTS = [
    ("torch", "te", ("--tp", "2", "--pp", "2")),
    ("torch", "local", ("--tp", "4", "--pp", "2", "--vpp", "2")),
    ("torch_dist", "te", ("--tp", "2", "--pp", "2")),
]


def same_tensors(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("fmt", "spec", "layout"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_model_there_and_back(
    family: str, fmt: str, spec: str, layout: tuple[str, ...], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(family)
    megatron = convert(model, tmp_path / "megatron", "--format", fmt, "--spec", spec, *layout)
    report = done("verify", model, megatron, "--json", "-q").json
    logits = next(level for level in report["levels"] if level["level"] == "logits")
    assert [level["passed"] for level in report["levels"]] == [True, True, True]
    assert logits["ratio"] <= 1e-4
    done("megatron2hf", megatron, tmp_path / "back", "-q")
    same_tensors(model, tmp_path / "back")
    # the weights are the same bits; where they lie in memory decides the order of some sums
    assert (
        done("verify", model, tmp_path / "back", "--level", "logits", "-q", "--json").json["levels"][0]["ratio"] <= 1e-5
    )


FAULTS: dict[str, Callable[[Path], None]] = {
    # stacked q, k, v taken as if it were stored group by group
    "phi3": lambda m: edit_tensors(
        m, "linear_qkv.weight", lambda t: t.view(-1, 8, t.shape[-1]).roll(1, 0).reshape(t.shape)
    ),
    "glm": lambda m: edit_args(m, rotary_interleaved=False),
    "seed_oss": lambda m: edit_tensors(m, "linear_qkv.bias", torch.zeros_like),
    "smollm3": lambda m: edit_args(m, no_rope_freq=None),
    "ernie4_5": lambda m: edit_args(m, rotary_interleaved=False),
    "stablelm": lambda m: edit_args(m, rotary_percent=0.5),
    "starcoder2": lambda m: edit_args(m, window_size=(8, 0)),
    "opt": lambda m: edit_tensors(m, "position_embeddings.weight", lambda t: t.roll(2, 0)),  # as they are stored
    "gpt_neox": lambda m: edit_args(m, bias_gelu_fusion=True),
    "deepseek_v2_lite": lambda m: edit_args(m, moe_router_pre_softmax=False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_fault_is_caught(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model(family)
    megatron = convert(model, tmp_path / "megatron", "--format", "torch", "--tp", "2")
    FAULTS[family](megatron)
    result = command("verify", model, megatron, "--level", "logits", "-q", "--json")
    assert result.code == 1, result.out
    assert not result.json["levels"][0]["passed"]
