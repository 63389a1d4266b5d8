"""Models that are not the asked one: the verdict with its reasons, exit 2, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from spoiled import Copied, Refused, TinyModel, edit_config


def test_an_unknown_architecture(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "translate", tiny_model("llama"), tmp_path / "dst", "--to", "acorn", names=("--to", "acorn", "llama"))


def test_no_directory_to_make(tiny_model: TinyModel, refused: Refused) -> None:
    refused(2, "translate", tiny_model("llama"), "--to", "qwen2", names=("DST", "--explain"))


PAIRS = [
    "llama to gpt2", "gpt2 to llama", "qwen3 to llama", "mixtral to llama", "deepseek_v3 to llama", "nemotron to phi3",
    "nemotron to llama", "opt to llama", "gpt_neox to llama", "gemma to gpt2", "llama3 to internlm2", "granite to gpt_neox",
    "starcoder2 to gpt_neox", "stablelm to phi3", "olmoe to mixtral", "granite to starcoder2", "granite to olmo",
]  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_a_model_that_the_target_cannot_hold(
    case: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    source, _, target = case.partition(" to ")
    refused(
        2, "translate", tiny_model(source), tmp_path / "dst", "--to", target, names=("cannot be translated to", target)
    )


def test_a_model_that_nothing_here_holds(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = edit_config(copied(tiny_model("llama")), model_type="bloom", architectures=["BloomForCausalLM"])
    refused(2, "translate", source, tmp_path / "dst", "--to", "llama", names=("bloom", "ALiBi"))
