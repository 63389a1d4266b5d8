"""A bias on the attention's output, all zeros: Hugging Face's Llama has it with attention_bias, Megatron has none.

What was translated to a Llama goes on to Megatron, and comes back with its zeros; a bias that is one is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measure import edit_config, edit_tensors, logits, same_bits, tensors

from commands import command, convert, done

TinyModel = Callable[[str], Path]
FORMATS = [("--format", "torch", "--tp", 2), ("--format", "torch_dist", "--pp", 2)]


@pytest.fixture
def llama(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A Qwen2 as a Llama with attention_bias."""
    done("translate", tiny_model("qwen2"), tmp_path / "llama", "--to", "llama", "-q")
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["attention_bias"] is True
    return tmp_path / "llama"


@pytest.mark.parametrize("options", FORMATS)
def test_the_way_on_is_the_direct_one(
    options: tuple[object, ...], llama: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    direct = convert(tiny_model("qwen2"), tmp_path / "direct", *options)
    way = convert(llama, tmp_path / "way", *options)
    assert done("diff", direct, way, "--json").json["findings"] == []
    assert done("diff", llama, direct, "--json").json["findings"] == []
    done("verify", llama, way, "--level", "accounting", "--level", "exact", "-q")
    # what Megatron trained from the one is what it trained from the other: the given config says what is written
    done("megatron2hf", way, tmp_path / "back", "-q")
    assert same_bits(tensors(tmp_path / "back"), tensors(llama))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["attention_bias"] is True
    done("megatron2hf", direct, tmp_path / "given", "--hf", llama, "-q")
    assert same_bits(tensors(tmp_path / "given"), tensors(llama))
    done("megatron2hf", way, tmp_path / "qwen2", "--hf", tiny_model("qwen2"), "-q")
    assert same_bits(tensors(tmp_path / "qwen2"), tensors(tiny_model("qwen2")))
    done("reshard", way, tmp_path / "again", "--tp", 1, "-q")
    done("megatron2hf", tmp_path / "again", tmp_path / "resharded", "-q")
    assert same_bits(tensors(tmp_path / "resharded"), tensors(llama))


def test_a_bias_that_is_one_is_refused(llama: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    direct = convert(tiny_model("qwen2"), tmp_path / "direct", "--format", "torch")
    shutil.copytree(llama, tmp_path / "biased")
    edit_tensors(tmp_path / "biased", lambda t: t["model.layers.2.self_attn.o_proj.bias"][5].fill_(0.5))
    for dry in ((), ("plan",)):
        result = command(*dry, "hf2megatron", tmp_path / "biased", tmp_path / "out")
        assert result.code == 1
        assert "model.layers.2.self_attn.o_proj.bias is not 0 everywhere" in result.err
        assert not (tmp_path / "out").exists()
    found = command("diff", tmp_path / "biased", direct)
    assert found.code == 1
    assert "self_attn.o_proj.bias" in found.out
    checked = command("verify", tmp_path / "biased", direct, "--level", "accounting", "--level", "exact")
    assert checked.code == 1
    assert "model.layers.2.self_attn.o_proj.bias is not 0 everywhere" in checked.out
    # two directories of the family are compared with all that they have
    assert command("diff", tmp_path / "biased", llama).code == 1
    assert command("verify", tmp_path / "biased", llama, "--level", "exact").code == 1
    assert command("diff", llama, shutil.copytree(llama, tmp_path / "same")).code == 0
    # and the family itself keeps it
    done("translate", tmp_path / "biased", tmp_path / "kept", "--to", "llama", "-q")
    assert same_bits(tensors(tmp_path / "kept"), tensors(tmp_path / "biased"))


def test_the_bias_must_be_there(llama: Path, tmp_path: Path) -> None:
    edit_tensors(llama, lambda t: t.pop("model.layers.1.self_attn.o_proj.bias"))
    result = command("hf2megatron", llama, tmp_path / "out")
    assert result.code == 1
    assert "missing: model.layers.1.self_attn.o_proj.bias" in result.err


def test_megatron_core_computes_the_same(llama: Path, tmp_path: Path) -> None:
    megatron = convert(llama, tmp_path / "megatron", "--tp", 2)
    done("verify", llama, megatron, "-q")
    edit_config(llama, rope_theta=500.0)
    assert command("verify", llama, megatron, "--level", "logits", "-q").code == 1


def test_the_bias_is_what_transformers_reads(llama: Path, tmp_path: Path) -> None:
    """The planted bias moves the logits: it is no tensor that could be dropped."""
    before = logits(llama, torch.float32)
    edit_tensors(llama, lambda t: [v.add_(0.5) for k, v in t.items() if k.endswith("o_proj.bias")])
    assert (before - logits(llama, torch.float32)).abs().max() > 0.1
