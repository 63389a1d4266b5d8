"""Every dense family through every layout: there, judged by megatron-core, back bit-identical, and resharded."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from commands import done
from shardtool.manifest import MANIFEST

FAMILIES = (
    "llama", "llama_tied", "llama3", "llama_linear", "mistral", "mistral_nemo", "qwen2", "qwen2_tied", "qwen3",
    "qwen3_tied", "gpt2",
)  # fmt: skip
FORMATS = ("torch", "torch_dist")
SPECS = ("te", "local")
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2))
CELLS = tuple(product(FORMATS, SPECS, LAYOUTS))
LARGEST = 1e-4  # max |delta logit| / std(logits), fp32

Megatron = Callable[..., Path]
TinyModel = Callable[[str], Path]


def name(cell: tuple[str, str, tuple[int, int]]) -> str:
    form, spec, (tp, pp) = cell
    return f"{form}-{spec}-tp{tp}-pp{pp}"


@pytest.fixture(scope="session")
def logits() -> Callable[[Path], torch.Tensor]:
    """The logits of a Hugging Face directory at every position of one fixed prompt, computed by transformers."""

    def get(directory: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(torch.arange(3, 115)[None]).logits

    return get


@pytest.fixture(scope="session")
def reference(tiny_model: TinyModel, logits: Callable[[Path], torch.Tensor]) -> Callable[[str], torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}

    def get(family: str) -> torch.Tensor:
        if family not in kept:
            kept[family] = logits(tiny_model(family))
        return kept[family]

    return get


def assert_same_tensors(model: Path, back: Path) -> None:
    """Bit for bit, and not one tensor more or less."""
    expected, found = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("cell", CELLS, ids=name)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(
    family: str,
    cell: tuple[str, str, tuple[int, int]],
    tiny_model: TinyModel,
    megatron: Megatron,
    reference: Callable[[str], torch.Tensor],
    logits: Callable[[Path], torch.Tensor],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    form, spec, (tp, pp) = cell
    model = tiny_model(family)
    checkpoint = megatron(family, form, spec, tp, pp)

    report = done("verify", model, checkpoint, "--json", "-q").json
    assert report["same"] is True
    assert [level["level"] for level in report["levels"]] == ["accounting", "exact", "logits"]
    assert all(level["passed"] is True for level in report["levels"])
    judged = report["levels"][-1]
    record_property("ratio", judged["ratio"])
    assert judged["std"] > 0.1
    assert judged["ratio"] <= LARGEST
    assert judged["positions"] >= 128
    assert judged["vocab_size"] == 120

    back = tmp_path / "back"
    done("megatron2hf", checkpoint, back, "-q")
    assert_same_tensors(model, back)
    assert torch.equal(logits(back), reference(family))

    with_hf = tmp_path / "with-hf"
    done("megatron2hf", checkpoint, with_hf, "--hf", model, "-q")
    assert_same_tensors(model, with_hf)
    companion = "generation_config.json"
    assert (with_hf / companion).read_bytes() == (model / companion).read_bytes()
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (with_hf, model))
    theirs.pop("dtype", None)
    assert {key: ours[key] for key in theirs} == theirs


def tree(root: Path) -> dict[str, bytes]:
    """The files' contents; the manifest says where they come from, which is not the same."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def resharded(source: Path, out: Path, cell: tuple[str, str, tuple[int, int]]) -> Path:
    form, spec, (tp, pp) = cell
    done("reshard", source, out, "--format", form, "--spec", spec, "--tp", tp, "--pp", pp, "-q")
    return out


def assert_reshards(
    family: str, source: tuple[str, str, tuple[int, int]], target: tuple[str, str, tuple[int, int]],
    megatron: Megatron, tmp_path: Path,
) -> None:  # fmt: skip
    """A reshard is the direct conversion, file by file and byte by byte: tensors, args, metadata and tracker."""
    direct = megatron(family, target[0], target[1], *target[2])
    start = megatron(family, source[0], source[1], *source[2])
    out = resharded(start, tmp_path / f"{name(source)}-to-{name(target)}", target)
    expected, found = tree(direct), tree(out)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == [], f"{name(source)} -> {name(target)}"


@pytest.mark.parametrize("source", CELLS, ids=name)
def test_reshard_from_any_to_any(source: tuple[str, str, tuple[int, int]], megatron: Megatron, tmp_path: Path) -> None:
    for target in CELLS:
        assert_reshards("qwen2_tied", source, target, megatron, tmp_path)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2_tied"])
def test_reshard_of_every_family(family: str, megatron: Megatron, tmp_path: Path) -> None:
    for step in (3, 11):  # every cell is a source and a target: other formats, specs, tp and pp
        for number, source in enumerate(CELLS):
            assert_reshards(family, source, CELLS[(number + step) % len(CELLS)], megatron, tmp_path)
