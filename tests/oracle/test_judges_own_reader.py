"""The judge's own loader refuses what the reader has refused before it: it trusts nobody, so it is tried by itself."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

from shardtool.errors import CheckpointError, UsageError
from shardtool.families.architecture import Rope, RopeScaling
from shardtool.layout.mesh import Mesh
from shardtool.verify import dequantised, dist_metadata, files, huggingface, logits, megatron_load, megatron_model

MESH = Mesh(tp=1, pp=1)


class Malicious:
    """Pickles to a call of os.system."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch canary",)


INDICES: dict[str, tuple[bytes | None, str]] = {
    "code": (pickle.dumps(Malicious()), "posix.system"),
    "no file": (None, "has no index"),
    "no pickle": (b"none", "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "another object": (pickle.dumps({}), "not DCP metadata"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_with(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = INDICES[case]
    if content is not None:
        (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        dist_metadata.read(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_an_index_without_an_embedding(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({})))
    with pytest.raises(CheckpointError, match="no input embedding"):
        megatron_load.stored_embedding(tmp_path, MESH)


TRACKERS = {"no tracker": (None, "not a Megatron"), "a word": ("soon", "names no iteration"), "5": ("5", "not exist")}


@pytest.mark.parametrize("case", TRACKERS)
def test_a_directory_with(case: str, tmp_path: Path) -> None:
    text, said = TRACKERS[case]
    if text is not None:
        (tmp_path / files.TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        files.iteration_directory(tmp_path)


def test_a_directory_without_shards(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no shards"):
        files.checkpoint_format(tmp_path)


RANKS: dict[str, tuple[object, str]] = {
    "no file": (None, "does not exist"),
    "code": ({"model": Malicious()}, "cannot be read"),
    "a list": ([1], "not a dict"),
    "no model": ({"args": 1}, "no weights of this model chunk"),
    "no embedding": ({"model": {}}, "no input embedding"),
}


@pytest.mark.parametrize("case", RANKS)
def test_a_rank_file_with(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = RANKS[case]
    path = files.rank_file(tmp_path, MESH, tp=0, pp=0)
    path.parent.mkdir(parents=True)
    if content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=said) as error:
        megatron_load.stored_embedding(tmp_path, MESH)
    assert str(path) in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_fp8_without_scales_or_with_others(tmp_path: Path) -> None:
    matrix, form = torch.ones(4, 4), {"weight_block_size": [2, 2]}
    for scale in (None, torch.ones(1, 2)):
        with pytest.raises(CheckpointError, match="cannot be dequantised") as error:
            dequantised._values("a.weight", matrix, scale, form, tmp_path)
        assert "a.weight" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_config_that_is(text: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config") as error:
        logits._config(logits.HuggingFaceSide(tmp_path))
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_directory_without_one_of_its_tensors(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tiny_model("llama") / "config.json").read_text())))
    with pytest.raises(CheckpointError, match="not those of its model") as error:
        huggingface.load(tmp_path)
    assert "model.norm.weight" in str(error.value)


def test_rope_scaling_with_constants_that_megatron_core_has_not() -> None:
    rope = Rope(theta=10000.0, scaling=RopeScaling("llama3", 8.0, low_freq_factor=2.0))
    with pytest.raises(UsageError, match="cannot express this rope scaling"):
        megatron_model._position_arguments(rope, latent=False)
    assert megatron_model._position_arguments(Rope(scaling=RopeScaling("llama3", 8.0)), latent=False)


def test_latent_attention_with_an_exact_range_of_yarn() -> None:
    a: Any = SimpleNamespace(mla=None, rope=Rope(scaling=RopeScaling("yarn", 4.0, truncate=False)))
    a.mla = SimpleNamespace(query_rank=8, key_value_rank=8, nope_dim=8, rope_dim=8, value_dim=8)
    with pytest.raises(UsageError, match="rounds yarn's correction range"):
        megatron_model._mla_arguments(a)
