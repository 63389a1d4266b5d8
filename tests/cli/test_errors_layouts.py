"""Parallel layouts and options that a model cannot have: one clear message, exit 2, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import builds
from spoiled import Refused, TinyModel

# the options, and what the error names
SPLITS = {
    "more accounted layers than a stage has": (
        "--pp 4 --vpp 2 --account-for-embedding --account-for-loss --pipeline-layout EtttttL|", "pipeline layout"
    ),
    "layers of the first stage and the embedding accounted for": (
        "--pp 2 --first-stage-layers 1 --account-for-embedding", "exclude each other"
    ),
    "layers of the first stage without a pipeline": ("--first-stage-layers 1", "more than one pipeline stage"),
    "no layers in the last stage": ("--pp 2 --last-stage-layers 0", "at least 1"),
    "both ends given and virtual stages": (
        "--pp 2 --vpp 2 --first-stage-layers 2 --last-stage-layers 2", "cannot number the layers"
    ),
    "virtual stages that do not divide a stage": ("--pp 2 --vpp 4", "4 virtual stages"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_a_pipeline_with(case: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    options, name = SPLITS[case]
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", *options.split(), names=(name,))


LAYOUTS = {
    "an unknown letter": ("--pp 2", "Etx|tL", "unknown letter"),
    "stages that do not divide by pp": ("--pp 2", "Et|t|ttL", "do not divide by pp"),
    "stages without a pipeline": ("", "Ett|ttL", "more than one pipeline stage"),
    "another number of virtual stages": ("--pp 2 --vpp 4", "Et|t|t|tL", "another number of virtual stages"),
    "too few layers": ("--pp 2", "Et|tL", "wrong number of layers"),
    "two embeddings": ("--pp 2", "EEtt|ttL", "wrong number of embeddings"),
    "the loss before a layer": ("--pp 2", "EttL|tt", "begin with the embedding"),
    "MTP layers of a model that has none": ("--pp 2", "Ett|ttmL", "wrong number of MTP layers"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_pipeline_layout_with(case: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    options, layout, name = LAYOUTS[case]
    arguments = ("hf2megatron", tiny_model("llama"), tmp_path / "dst", *options.split(), "--pipeline-layout", layout)
    refused(2, *arguments, names=(name,))


EXPERTS = {
    "ep that does not divide the experts": ("mixtral", "--ep 3", "does not divide"),
    "etp in per-rank files that cannot hold it": ("mixtral", "--tp 2 --ep 2 --etp 4 --format torch", "per-rank files"),
    "sizes of which none is a multiple of the other": ("mixtral", "--tp 2 --ep 3 --etp 1", "ep 3"),
    "biases, split": ("gpt_oss", "--tp 2 --etp 2 --allow-inexact", "experts with biases"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_with(case: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    model, options, name = EXPERTS[case]
    refused(2, "hf2megatron", tiny_model(model), tmp_path / "dst", *options.split(), names=(name,))


def test_a_model_that_megatron_core_computes_differently(
    tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    refused(2, "hf2megatron", tiny_model("olmoe"), tmp_path / "dst", names=("another function", "--allow-inexact"))


def test_two_options_that_exclude_each_other(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    options = ("--no-checksums", "--tensor-digests")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", *options, names=options)


def test_multi_token_prediction_before_the_last_layer(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model("deepseek_v3"), tmp_path / "source")
    builds.with_multi_token_prediction(source)
    arguments = ("hf2megatron", source, tmp_path / "dst", "--pp", 2, "--pipeline-layout")
    refused(2, *arguments, "Et*2mt|t*LAYERSL".replace("*LAYERS", ""), names=("MTP",))
