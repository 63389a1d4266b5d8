"""Families whose weights Megatron holds with something folded into them: gamma - 1, factors of embeddings and residuals.

What goes there and back unchanged, what within one rounding, real megatron-core against transformers, and faults.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import command, convert, done
from faults import edit_args, edit_tensors
from shardtool import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
LAYOUTS = [
    ("torch", "te", ("--tp", "2", "--pp", "2")),
    ("torch", "local", ("--tp", "4", "--pp", "2", "--vpp", "2")),
    ("torch_dist", "te", ("--tp", "2", "--pp", "2")),
    ("torch_dist", "local", ("--tp", "2", "--pp", "2")),
]
NORMS = r".*(layernorm|model\.norm)\.weight"
RESIDUAL = r".*(o_proj|down_proj|output_linear)\.weight"
EMBEDDING = r"model\.embed_tokens\.weight"
# the tensors that come back within one rounding, by family and spec; all others are bit-identical
ROUNDED = {
    ("gemma", "te"): (),
    ("gemma", "local"): (NORMS,),
    ("gemma_untied", "te"): (EMBEDDING,),
    ("gemma_untied", "local"): (EMBEDDING, NORMS),
    ("nemotron", "te"): (),
    ("nemotron", "local"): (NORMS,),
    ("granite", "te"): (RESIDUAL,),  # its logits_scaling is a power of two
    ("granite", "local"): (RESIDUAL,),
    ("granitemoe", "te"): (RESIDUAL, EMBEDDING, r"model\.norm\.weight"),
    ("granitemoe", "local"): (RESIDUAL, EMBEDDING, r"model\.norm\.weight"),
}
FAMILIES = ["gemma", "gemma_untied", "nemotron", "granite", "granitemoe"]


def check_back(model: Path, back: Path, rounded: tuple[str, ...]) -> None:
    """Bit-identical, but for the named tensors: these are one rounding of the value (of gamma) off at most."""
    ours, theirs = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        if not any(re.fullmatch(pattern, name) for pattern in rounded):
            assert torch.equal(tensor, theirs[name]), name
            continue
        gap = (tensor.double() - theirs[name].double()).abs()
        size = tensor.double().abs() + (1 if re.fullmatch(NORMS, name) else 0)
        assert bool((gap <= torch.finfo(tensor.dtype).eps * size).all()), name


@pytest.mark.parametrize(("fmt", "spec", "layout"), LAYOUTS, ids=lambda item: item if isinstance(item, str) else "")
@pytest.mark.parametrize("family", FAMILIES)
def test_same_model_there_and_back(
    family: str, fmt: str, spec: str, layout: tuple[str, ...], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(family)
    megatron = convert(model, tmp_path / "megatron", "--format", fmt, "--spec", spec, *layout)
    report = done("verify", model, megatron, "--json", "-q").json
    assert [level["passed"] for level in report["levels"]] == [True, True, True]
    assert report["levels"][2]["ratio"] <= 1e-4
    done("megatron2hf", megatron, tmp_path / "back", "-q")
    check_back(model, tmp_path / "back", ROUNDED[family, spec])


@pytest.fixture(scope="module")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model stored in bf16."""
    root = tmp_path_factory.mktemp("bf16")

    def get(name: str) -> Path:
        return (
            root / name
            if (root / name).exists()
            else tiny.build(CONFIGS / f"{name}.json", root / name, dtype="bfloat16")
        )

    return get


@pytest.mark.parametrize("spec", ["te", "local"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_by_way_of_fp32_is_bit_identical(
    family: str, spec: str, bf16_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = bf16_model(family)
    megatron = convert(model, tmp_path / "megatron", "--dtype", "fp32", "--spec", spec, "--tp", "2", "--pp", "2")
    done("megatron2hf", megatron, tmp_path / "back", "--dtype", "bf16", "-q")
    check_back(model, tmp_path / "back", ())


@pytest.mark.parametrize("family", ["gemma", "granite", "nemotron"])
def test_bf16_is_the_same_model_in_bf16(family: str, bf16_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Products are rounded once, and what the weights are made of comes back within that."""
    model = bf16_model(family)
    megatron = convert(model, tmp_path / "megatron", "--format", "torch", "--tp", "2")
    level = done("verify", model, megatron, "--level", "logits", "--dtype", "native", "-q", "--json").json["levels"][0]
    assert level["passed"]
    assert command("verify", model, megatron, "--level", "exact", "-q").code == 0
    done("megatron2hf", megatron, tmp_path / "back", "-q")
    check_back(model, tmp_path / "back", ROUNDED[family, "te"])


def test_what_megatron_holds(bf16_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Plain statements, at tp 1."""

    def held(family: str, spec: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = bf16_model(family)
        out = convert(model, tmp_path / f"{family}-{spec}", "--format", "torch", "--spec", spec)
        content = torch.load(next(out.glob("*/mp_rank_00/model_optim_rng.pt")), weights_only=False)
        return load_file(model / "model.safetensors"), content["model"]

    hf, megatron = held("gemma", "te")
    tokens = hf["model.embed_tokens.weight"]
    factor = torch.tensor(math.sqrt(96), dtype=torch.bfloat16)
    assert torch.equal(megatron["embedding.word_embeddings.weight"][:120], tokens * factor)
    assert torch.equal(megatron["output_layer.weight"][:120], tokens)
    assert torch.equal(megatron["decoder.final_layernorm.weight"], hf["model.norm.weight"])
    hf, megatron = held("gemma", "local")
    assert torch.equal(megatron["decoder.final_layernorm.weight"], (hf["model.norm.weight"].float() + 1).bfloat16())
    hf, megatron = held("nemotron", "local")
    assert torch.equal(
        megatron["decoder.layers.1.input_layernorm.weight"],
        (hf["model.layers.1.input_layernorm.weight"].float() + 1).bfloat16(),
    )
    assert torch.equal(megatron["decoder.layers.1.input_layernorm.bias"], hf["model.layers.1.input_layernorm.bias"])
    hf, megatron = held("granite", "te")
    tokens = hf["model.embed_tokens.weight"]
    assert torch.equal(megatron["embedding.word_embeddings.weight"][:120], (tokens.float() * 12).bfloat16())
    assert torch.equal(megatron["output_layer.weight"][:120], tokens)
    assert torch.equal(megatron["decoder.final_layernorm.weight"], (hf["model.norm.weight"].float() / 8).bfloat16())
    for ours, theirs in (("mlp.linear_fc2", "mlp.down_proj"), ("self_attention.linear_proj", "self_attn.o_proj")):
        product = (hf[f"model.layers.2.{theirs}.weight"].float() * 0.22).bfloat16()
        assert torch.equal(megatron[f"decoder.layers.2.{ours}.weight"], product)


def test_embedding_and_head_that_training_moved_apart(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """They are one tensor in Gemma no more: refused with the way out, which a config without tied embeddings is."""
    model = tiny_model("gemma")
    megatron = convert(model, tmp_path / "megatron", "--format", "torch", "--tp", "2", "--pp", "2")
    edit_tensors(megatron, "output_layer.weight", lambda t: t * 1.5)
    for name in ("hf_model_type", "hf_folded"):  # a run of Megatron-LM does not keep them
        edit_args(megatron, **{name: None})
    refused = command("megatron2hf", megatron, tmp_path / "tied", "--hf", model, "-q")
    assert refused.code == 1
    assert "tie_word_embeddings false" in refused.err
    done("megatron2hf", megatron, tmp_path / "back", "--hf", CONFIGS / "gemma_untied.json", "-q")
    report = done("verify", tmp_path / "back", megatron, "--level", "logits", "-q", "--json").json
    assert report["levels"][0]["ratio"] <= 1e-4


def test_resharding_needs_no_family(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Between layouts, and from gamma - 1 under Transformer Engine's names to gamma under the local ones."""
    model = tiny_model("gemma")
    first = convert(model, tmp_path / "first", "--format", "torch", "--tp", "2", "--pp", "2")
    done("reshard", first, tmp_path / "second", "--format", "torch_dist", "--tp", "4", "-q")
    done("reshard", tmp_path / "second", tmp_path / "third", "--format", "torch", "--spec", "local", "-q")
    for checkpoint, spec in (("second", "te"), ("third", "local")):
        report = done("verify", model, tmp_path / checkpoint, "--json", "-q").json
        assert [level["passed"] for level in report["levels"]] == [True, True, True]
        done("megatron2hf", tmp_path / checkpoint, tmp_path / f"{checkpoint}-back", "-q")
        check_back(model, tmp_path / f"{checkpoint}-back", ROUNDED["gemma", spec])


FAULTS: list[tuple[str, Callable[[Path], None]]] = [
    # gamma without the one
    ("gemma", lambda m: edit_args(m, apply_layernorm_1p=False)),
    ("nemotron", lambda m: edit_args(m, apply_layernorm_1p=False)),
    # factors forgotten
    ("gemma", lambda m: edit_tensors(m, "word_embeddings.weight", lambda t: t / math.sqrt(96))),
    ("granite", lambda m: edit_tensors(m, "word_embeddings.weight", lambda t: t / 12)),
    ("granite", lambda m: edit_tensors(m, "linear_fc2.weight", lambda t: t / 0.22)),
    ("granite", lambda m: edit_tensors(m, "linear_proj.weight", lambda t: t / 0.22)),
    ("granite", lambda m: edit_tensors(m, "final_layernorm.weight", lambda t: t * 8)),
    ("granite", lambda m: edit_args(m, softmax_scale=None)),
    ("granitemoe", lambda m: edit_args(m, moe_router_pre_softmax=True)),
    # another activation
    ("gemma", lambda m: edit_args(m, hf_hidden_act="gelu")),
    ("nemotron", lambda m: edit_args(m, squared_relu=False)),
]


@pytest.mark.parametrize(("family", "fault"), FAULTS)
def test_a_planted_fault_is_caught(
    family: str, fault: Callable[[Path], None], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(family)
    megatron = convert(model, tmp_path / "megatron", "--format", "torch", "--tp", "2")
    fault(megatron)
    result = command("verify", model, megatron, "--level", "logits", "-q", "--json")
    assert result.code == 1, result.out
    assert not result.json["levels"][0]["passed"]
