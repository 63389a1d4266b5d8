"""docs/adding-a-family.md, run as it stands: the made-up family converts, is the same model, and its fault is caught."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import command, convert, done
from shardtool.families.registry import FAMILIES

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "oracle"))  # the planted faults that the guide uses

from faults import edit_tensors  # noqa: E402 - found through the line above


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the guide's blocks define."""
    monkeypatch.setattr("shardtool.families.registry.FAMILIES", FAMILIES)
    names: dict[str, Any] = {"torch": torch, "edit_tensors": edit_tensors, "FAMILIES": FAMILIES}
    text = (ROOT / "docs" / "adding-a-family.md").read_text()
    try:
        for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            exec(block, names)  # the page is part of the project
        yield names
    finally:
        FAMILIES.pop("acorn", None)


def test_the_guide(guide: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    twin, model = tiny_model("llama"), tmp_path / "acorn"
    model.mkdir()
    tensors = guide["acorn"](load_file(twin / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(guide["acorn_config"]))
    for fmt in ("torch", "torch_dist"):
        megatron = convert(model, tmp_path / fmt, "--format", fmt, "--tp", "2", "--pp", "2")
        level = done("verify", twin, megatron, "--level", "logits", "-q", "--json").json["levels"][0]
        assert level["ratio"] <= 1e-4
        done("megatron2hf", megatron, tmp_path / f"{fmt}-back", "-q")
        back = load_file(tmp_path / f"{fmt}-back" / "model.safetensors")
        assert back.keys() == tensors.keys()
        assert all(torch.equal(tensors[name], back[name]) for name in back)
    guide["fault"](tmp_path / "torch")
    assert command("verify", twin, tmp_path / "torch", "--level", "logits", "-q").code == 1


def test_its_refusal(guide: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(guide["acorn_config"] | {"parallel": True}))
    save_file({"norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    result = command("hf2megatron", tmp_path, tmp_path.parent / "out")
    assert result.code == 2
    assert "parallel residuals" in result.err
