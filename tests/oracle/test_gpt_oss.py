"""gpt-oss: real megatron-core against transformers, with a clamp that acts, and from MXFP4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import command, convert, done
from faults import contents, edit_args, edit_tensors
from shardtool import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
LAYOUTS = {
    "te": ("--format", "torch", "--tp", 2, "--etp", 1, "--pp", 2, "--vpp", 2, "--ep", 2),
    "local": ("--format", "torch", "--spec", "local", "--experts", "sequential", "--tp", 2, "--etp", 1, "--pp", 2),
    "dist": ("--format", "torch_dist", "--tp", 2, "--etp", 1, "--pp", 2, "--ep", 4),
}


@pytest.fixture(scope="module")
def clamped(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gate and up projections are often beyond the clamp of 7."""
    model = shutil.copytree(tiny_model("gpt_oss"), tmp_path_factory.mktemp("clamped") / "model")
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if name.endswith("gate_up_proj"):
            tensors[name] *= 10
        elif name.endswith("experts.down_proj"):
            tensors[name] /= 20
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_model_there_and_back(layout: str, clamped: Path, tmp_path: Path) -> None:
    megatron = convert(clamped, tmp_path / "megatron", *LAYOUTS[layout])
    report = done("verify", clamped, megatron, "--json", "-q").json
    assert [level["passed"] for level in report["levels"]] == [True, True, True]
    assert report["levels"][-1]["ratio"] <= 1e-4
    done("megatron2hf", megatron, tmp_path / "back", "-q")
    assert tiny.differences(clamped, tmp_path / "back")[1] == []
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2


def another_experts_bias(checkpoint: Path) -> None:
    for content in contents(checkpoint):
        model = content["model"]
        name = "decoder.layers.1.mlp.experts.linear_fc1.bias{}"
        one, other = name.format(2), name.format(3)
        model[one], model[other] = model[other], model[one]


FAULTS: dict[str, Callable[[Path], None]] = {
    "gate and up alternate": lambda m: edit_tensors(
        m, "linear_fc1.weight0", lambda t: t.view(2, -1, t.shape[-1]).transpose(0, 1).reshape(t.shape)
    ),
    "no sinks": lambda m: edit_tensors(m, "softmax_offset", lambda t: torch.full_like(t, -1e4)),
    "sinks of other heads": lambda m: edit_tensors(m, "softmax_offset", lambda t: t.roll(1)),
    "the window on the other layers": lambda m: edit_args(m, window_attn_skip_freq=[0, 1, 0, 1]),
    "the window on all layers": lambda m: edit_args(m, window_attn_skip_freq=None),
    "a window one longer": lambda m: edit_args(m, window_size=(8, 0)),
    "another expert's bias": another_experts_bias,
    "no router bias": lambda m: edit_tensors(m, "router.bias", torch.zeros_like),
    "no clamp": lambda m: edit_args(m, activation_func_clamp_value=None),
    "no offset": lambda m: edit_args(m, glu_linear_offset=0.0),
    "a rounded correction range": lambda m: edit_args(m, yarn_correction_range_round_to_int=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, clamped: Path, tmp_path: Path) -> None:
    megatron = convert(clamped, tmp_path / "megatron", "--format", "torch", "--tp", 2, "--etp", 1)
    FAULTS[fault](megatron)
    result = command("verify", clamped, megatron, "--level", "logits", "-q", "--json")
    assert result.code == 1, result.out
    assert not result.json["levels"][0]["problems"]


def test_biased_experts_are_not_split(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    result = command("hf2megatron", tiny_model("gpt_oss"), tmp_path / "out", "--tp", 2)
    assert result.code == 2
    assert "--etp 1" in result.err


# --- MXFP4 -----------------------------------------------------------------------------------------------------------

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
EXPERTS, HIDDEN, ROWS = 8, 64, {"gate_up_proj": 2 * 32, "down_proj": 64}
INNER = {"gate_up_proj": HIDDEN, "down_proj": 32}


def dequantised(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[expert, in, out] of blocks [expert, out, in / 32, 16] and scales [expert, out, in / 32], the low half byte first."""
    values = FP4[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
    values = values * torch.exp2(scales.float() - 127)[..., None]
    return values.flatten(-2).transpose(1, 2).contiguous().to(torch.bfloat16)


@pytest.fixture(scope="module")
def micro_scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model with experts in MXFP4, the same dequantised to bf16)."""
    root = tmp_path_factory.mktemp("mxfp4")
    config = json.loads((CONFIGS / "gpt_oss.json").read_text()) | {"intermediate_size": 32}
    plain = tiny.build(config, root / "plain", dtype="bfloat16")
    tensors = load_file(plain / "model.safetensors")
    generator, quantised = torch.Generator().manual_seed(3), dict(tensors)
    for name in [name for name in tensors if name.endswith(tuple(ROWS))]:
        kind = name.rpartition(".")[2]
        shape = (EXPERTS, ROWS[kind], INNER[kind] // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 125, shape, dtype=torch.uint8, generator=generator)
        del quantised[name]
        quantised |= {name + "_blocks": blocks, name + "_scales": scales}
        tensors[name] = dequantised(blocks, scales)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (root / "quantised").mkdir()
    save_file(quantised, root / "quantised" / "model.safetensors", {"format": "pt"})
    written = json.loads((plain / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (root / "quantised" / "config.json").write_text(json.dumps(written))
    return root / "quantised", plain


def test_the_statement_is_that_of_transformers(micro_scaled: tuple[Path, Path]) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="an older transformers")
    stored = load_file(micro_scaled[0] / "model.safetensors")
    plain = load_file(micro_scaled[1] / "model.safetensors")
    for kind in ROWS:
        name = f"model.layers.0.mlp.experts.{kind}"
        theirs = mxfp4.convert_moe_packed_tensors(stored[name + "_blocks"], stored[name + "_scales"])
        assert torch.equal(theirs, plain[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mxfp4_converts_as_its_dequantised_model(layout: str, micro_scaled: tuple[Path, Path], tmp_path: Path) -> None:
    """No element differs: the tensors of every rank, and what comes back."""
    quantised, plain = micro_scaled
    one = convert(quantised, tmp_path / "one", *LAYOUTS[layout])
    other = convert(plain, tmp_path / "other", *LAYOUTS[layout])
    for ours, theirs in zip(sorted(one.rglob("*")), sorted(other.rglob("*")), strict=True):
        if ours.suffix == ".distcp":
            assert ours.read_bytes() == theirs.read_bytes(), ours
    for ours, theirs in zip(contents(one), contents(other), strict=True):
        for chunk in (key for key in ours if key.startswith("model")):
            assert ours[chunk].keys() == theirs[chunk].keys()
            for name, value in ours[chunk].items():
                assert value is None or torch.equal(value, theirs[chunk][name]), name
    done("megatron2hf", one, tmp_path / "back", "-q")
    assert tiny.differences(plain, tmp_path / "back")[1] == []
    if layout == "dist":
        report = done("verify", quantised, one, "--json", "-q").json
        assert [level["passed"] for level in report["levels"]] == [True, True, True]
        assert report["levels"][-1]["ratio"] <= 1e-4
