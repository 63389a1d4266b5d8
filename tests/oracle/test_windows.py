"""A sliding window on some layers: Qwen2's and dots1's max_window_layers and layer_types, in megatron-core."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import command, convert, done
from faults import edit_args
from shardtool import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
ON = {"use_sliding_window": True, "sliding_window": 8}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CASES = {
    "qwen2": ("qwen2", ON | {"max_window_layers": 2}, [0, 0, 1, 1]),
    "qwen3": ("qwen3", ON | {"layer_types": TYPES}, [0, 1, 1, 0]),
    "dots1": ("dots1", {"sliding_window": 8, "max_window_layers": 3}, [0, 0, 0, 1]),
    "dots1, all layers": ("dots1", {"sliding_window": 8, "max_window_layers": 0}, None),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[int] | None]:
    name, changes, flags = CASES[request.param]
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    return tiny.build(config, tmp_path / "model"), flags


def test_the_same_model_there_and_back(case: tuple[Path, list[int] | None], tmp_path: Path) -> None:
    model, flags = case
    megatron = convert(model, tmp_path / "megatron", "--format", "torch", "--tp", 2, "--pp", 2)
    report = done("verify", model, megatron, "--json", "-q").json
    assert report["levels"][-1]["ratio"] <= 1e-4
    assert ("--window-attn-skip-freq" in done("args", megatron).out) is (flags is not None)
    done("megatron2hf", megatron, tmp_path / "back", "-q")
    assert tiny.differences(model, tmp_path / "back")[1] == []
    before, after = (json.loads((place / "config.json").read_text()) for place in (model, tmp_path / "back"))
    assert after["sliding_window"] == before["sliding_window"] == 8
    assert after.get("layer_types", before["layer_types"]) == before["layer_types"]


FAULTS: dict[str, Callable[[Path], None]] = {
    "the window on the other layers": lambda m: edit_args(m, window_attn_skip_freq=[1, 1, 0, 0]),
    "no window": lambda m: edit_args(m, window_size=None),
    "a window one longer": lambda m: edit_args(m, window_size=(8, 0)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["qwen2", "dots1, all layers"])
def test_a_planted_fault_is_caught(name: str, fault: str, tmp_path: Path) -> None:
    family, changes, _ = CASES[name]
    config = json.loads((CONFIGS / f"{family}.json").read_text()) | changes
    model = tiny.build(config, tmp_path / "model")
    megatron = convert(model, tmp_path / "megatron", "--format", "torch")
    FAULTS[fault](megatron)
    assert command("verify", model, megatron, "--level", "logits", "-q").code == 1


def test_as_a_family_that_has_one_window_for_all_layers(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "qwen2.json").read_text()) | CASES["qwen2"][1]
    model = tiny.build(config, tmp_path / "model")
    verdict = done("translate", model, tmp_path / "out", "--to", "llama", "-q", "--json").json["verdict"]
    assert (verdict["level"], verdict["within"]) == ("conditional", "identical")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 8
