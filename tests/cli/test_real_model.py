"""SmolLM2-135M-Instruct, as scripts/demo converts it: 9 query heads over tp 3, 3 groups, 30 layers, tied, bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from commands import convert, done
from shardtool import tiny

FEW = ("--level", "accounting", "--level", "exact", "--level", "logits", "--max-tokens", 40)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_there_and_back(
    form: str, smollm2_dir: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    there = convert(smollm2_dir, tmp_path / "tp3-pp2", "--tp", 3, "--pp", 2, "--format", form)
    facts = done("inspect", there, "--json").json
    assert facts["layout"]["tp"] == 3
    assert facts["dtypes"].keys() == {"bfloat16"}
    report = done("verify", smollm2_dir, there, *FEW, "--json", "-q").json
    assert all(level["passed"] for level in report["levels"])
    record_property("ratio", report["levels"][-1]["ratio"])
    assert report["levels"][-1]["ratio"] <= 1e-4

    other = tmp_path / "tp1-pp5"
    done("reshard", there, other, "--tp", 1, "--pp", 5, "-q")
    back = tmp_path / "back"
    done("megatron2hf", other, back, "--hf", smollm2_dir, "-q")
    count, differences = tiny.differences(smollm2_dir, back)
    assert (count, differences) == (272, [])
    for companion in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (back / companion).read_bytes() == (smollm2_dir / companion).read_bytes()
    if form == "torch_dist":  # the same files as from torch
        tokens, text = tiny.answer(back, max_new_tokens=8)
        assert tokens == tiny.answer(smollm2_dir, max_new_tokens=8)[0]
        assert "Paris" in text
