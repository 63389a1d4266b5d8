"""Qwen3-Next and Qwen3.5: megatron-core's own gated delta net on the CPU against transformers, in every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import command, convert, done
from faults import edit_tensors
from shardtool import tiny

FAMILIES = ["qwen3_next", "qwen3_5", "qwen3_5_moe"]
LAYOUTS = [
    ("torch", "te", ("--tp", "2", "--pp", "2")),
    ("torch", "local", ("--tp", "4", "--pp", "2", "--vpp", "2", "--experts", "sequential")),
    ("torch_dist", "te", ("--tp", "2", "--pp", "2")),
]
KEY_HEADS, VALUES, KEY_DIM, VALUE_DIM = 4, 2, 8, 16  # of configs/tiny/qwen3_*.json; VALUES value heads per key head


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
    assert [level["passed"] for level in report["levels"]] == [True, True, True], report
    assert report["levels"][-1]["ratio"] <= 1e-4
    done("megatron2hf", megatron, tmp_path / "back", "-q")
    differing = tiny.differences(model, tmp_path / "back")[1]
    if spec == "te":
        assert differing == []
    else:  # 1 + weight was rounded; nothing else is
        assert differing and all("norm.weight" in line for line in differing)
        ours, theirs = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
        for name in (line.split(":")[0] for line in differing):
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=2e-7)


@pytest.mark.parametrize("ep", [2, 4])
def test_with_expert_parallelism(ep: int, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("qwen3_next")
    direct = convert(model, tmp_path / "direct", "--tp", 2, "--ep", ep, "--etp", 1, "--format", "torch")
    other = convert(model, tmp_path / "other", "--tp", 4, "--pp", 2)
    done("reshard", other, tmp_path / "again", "-q", "--tp", 2, "--ep", ep, "--etp", 1, "--format", "torch")
    assert done("verify", direct, tmp_path / "again", "--level", "exact", "--json", "-q").json["same"]
    done("megatron2hf", tmp_path / "again", tmp_path / "back", "-q")
    assert tiny.differences(model, tmp_path / "back")[1] == []


def test_multi_token_prediction_is_read_from_disk_and_written_back(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers has no code for it: the tensors of an attention layer, and four of its own."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_next"), model)
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    added = {
        name.replace("model.layers.3.", "mtp.layers.0."): torch.randn(value.shape, generator=generator)
        for name, value in tensors.items()
        if name.startswith("model.layers.3.")
    }
    hidden = tensors["model.norm.weight"].shape[0]
    for name in ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"):
        added[name + ".weight"] = torch.randn(hidden, generator=generator)
    added["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, generator=generator)
    save_file(tensors | added, model / "model.safetensors", {"format": "pt"})
    for fmt in ("torch", "torch_dist"):
        megatron = convert(model, tmp_path / fmt, "--tp", 2, "--pp", 2, "--format", fmt)
        done("megatron2hf", megatron, tmp_path / f"{fmt}-back", "-q")
        count, differing = tiny.differences(model, tmp_path / f"{fmt}-back")
        assert differing == []
        assert count == len(tensors | added)
    content = torch.load(tmp_path / "torch/release/mp_rank_01_001/model_optim_rng.pt", weights_only=False)["model"]
    rows = added["mtp.fc.weight"].chunk(2)[1]
    assert torch.equal(content["mtp.layers.0.eh_proj.weight"], rows)
    assert torch.equal(content["mtp.layers.0.enorm.weight"], added["mtp.pre_fc_norm_embedding.weight"])
    assert json.loads((tmp_path / "torch-back" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def regrouped(value: torch.Tensor) -> torch.Tensor:
    """The rows of Megatron's in_proj as if the file's order, key head by key head, had been kept."""
    rows, each = value.shape[0], 2 * KEY_DIM + 2 * VALUES * VALUE_DIM
    heads = rows // (each + 2 * VALUES)
    parts = value.split([heads * n for n in (KEY_DIM, KEY_DIM, VALUES * VALUE_DIM, VALUES * VALUE_DIM, 2 * VALUES)])
    mixed = torch.cat([part.reshape(heads, -1, value.shape[1]) for part in parts[:4]], dim=1).flatten(0, 1)
    return torch.cat([mixed, parts[4]])


FAULTS: dict[str, Callable[[Path], None]] = {
    "in_proj in the file's order": lambda m: edit_tensors(m, "in_proj.weight", regrouped),
    "beta and alpha exchanged": lambda m: edit_tensors(
        m, "in_proj.weight", lambda t: torch.cat([t[:-8], t[-4:], t[-8:-4]])
    ),
    "norm of the delta net without its one": lambda m: edit_tensors(m, "out_norm.weight", lambda t: t + 1),
    "norms of the layers with one": lambda m: edit_tensors(m, "in_proj.layer_norm_weight", lambda t: t + 1),
    "decay forgotten": lambda m: edit_tensors(m, "A_log", torch.zeros_like),
    "query and gate exchanged": lambda m: edit_tensors(
        m, "linear_qkv.weight", lambda t: t.view(2, -1, 16, 64)[:, [2, 3, 0, 1, 4, 5]].reshape(t.shape)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("qwen3_next")
    megatron = convert(model, tmp_path / "megatron", "--format", "torch", "--tp", "2")
    FAULTS[fault](megatron)
    assert command("verify", model, megatron, "--level", "logits", "-q").code == 1


def test_key_heads_that_tensor_parallelism_does_not_divide(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    result = command("hf2megatron", tiny_model("qwen3_next"), tmp_path / "out", "--tp", 8)
    assert result.code == 2
    assert "key heads of linear attention" in result.err
