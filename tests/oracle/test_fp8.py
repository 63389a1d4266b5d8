"""FP8 sources: block-quantised directories convert to what an independent dequantisation of them converts to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builds import FP8_BLOCK as BLOCK
from builds import FP8_LAST as LAST
from builds import quantised
from commands import command, convert, done
from shardtool import tiny


def dequantised(matrix: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each element times the scale of its block in fp32, rounded once."""
    row = torch.arange(matrix.shape[0])[:, None] // BLOCK[0]
    column = torch.arange(matrix.shape[1])[None] // BLOCK[1]
    return (matrix.float() * scales[row, column]).to(dtype)


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(tiny DeepSeek-V3 in FP8, the same dequantised to bfloat16 by plain torch)."""
    root = tmp_path_factory.mktemp("fp8")
    source = tiny_model("deepseek_v3")
    tensors = load_file(source / "model.safetensors")
    small, plain = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, value in tensors.items():
        if name.split(".")[-2] in LAST:
            matrix, scales = quantised(value)
            small |= {name: matrix, name + "_scale_inv": scales}
            plain[name] = dequantised(matrix, scales, torch.bfloat16)
        else:
            kept = value if name.endswith("e_score_correction_bias") else value.bfloat16()
            small[name] = plain[name] = kept
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    form = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    for folder, held, extra in (("fp8", small, {"quantization_config": form}), ("plain", plain, {})):
        (root / folder).mkdir()
        save_file({k: v.contiguous() for k, v in held.items()}, root / folder / "model.safetensors", {"format": "pt"})
        (root / folder / "config.json").write_text(json.dumps(config | extra))
    return root / "fp8", root / "plain"


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "torch", "--tp", 2, "--pp", 2, "--ep", 2),
        ("--format", "torch_dist", "--tp", 4, "--pp", 2),
        ("--format", "torch", "--spec", "local", "--experts", "sequential", "--tp", 4, "--ep", 4, "--etp", 1),
        ("--format", "torch", "--tp", 2, "--dtype", "fp32"),
    ],
    ids=["te", "dist", "local", "fp32"],
)
def test_no_element_differs_from_the_dequantised_model(
    options: tuple[object, ...], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    fp8, plain = pair
    ours = convert(fp8, tmp_path / "ours", *options)
    if "fp32" in options:  # straight to fp32: not by way of bfloat16
        done("megatron2hf", ours, tmp_path / "back", "-q")
        back, held = load_file(tmp_path / "back" / "model.safetensors"), load_file(fp8 / "model.safetensors")
        name = "model.layers.2.mlp.experts.3.down_proj.weight"
        assert torch.equal(back[name], dequantised(held[name], held[name + "_scale_inv"], torch.float32))
        return
    theirs = convert(plain, tmp_path / "theirs", *options)
    for path in sorted(theirs.rglob("*")):
        if path.is_file() and path.suffix in (".pt", ".distcp") and path.name != "common.pt":
            assert path.read_bytes() == (ours / path.relative_to(theirs)).read_bytes(), path
    done("megatron2hf", ours, tmp_path / "back", "--hf", fp8, "-q")
    assert tiny.differences(plain, tmp_path / "back")[1] == []
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert done("verify", fp8, ours, "--level", "accounting", "--level", "exact", "-q", "--json").json["same"]


def test_the_model_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In fp32, without the rounding to bfloat16: transformers on a dequantised copy, megatron-core on the conversion."""
    fp8, _ = pair
    ours = convert(fp8, tmp_path / "ours", "--tp", 2, "--pp", 2, "--dtype", "fp32")
    level = done("verify", fp8, ours, "--level", "logits", "-q", "--json").json["levels"][0]
    assert level["ratio"] <= 1e-4


def test_a_scale_that_is_transposed_is_caught(pair: tuple[Path, Path], tmp_path: Path) -> None:
    fp8, plain = pair
    broken = tmp_path / "broken"
    broken.mkdir()
    held = load_file(fp8 / "model.safetensors")
    name = "model.layers.0.self_attn.q_b_proj.weight_scale_inv"
    held[name] = held[name].flip(0)
    save_file(held, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_text((fp8 / "config.json").read_text())
    out = convert(broken, tmp_path / "out", "--format", "torch")
    assert command("verify", plain, out, "--level", "exact", "-q").code == 1
    assert command("verify", plain, out, "--level", "logits", "-q").code == 1
