"""pytorch_model.bin checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from filled import load, same
from shardtool.errors import CheckpointError
from shardtool.formats.hf_bin import read_checkpoint

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


def test_one_file(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    tensors = read_checkpoint(tmp_path)
    assert list(tensors) == list(STATE) and all(same(load(tensors[name]), STATE[name]) for name in STATE)


def test_a_trainers_file(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert list(read_checkpoint(tmp_path)) == list(STATE)


def test_tied_weights_share_a_storage(tmp_path: Path) -> None:
    torch.save({"a": STATE["a"], "tied": STATE["a"]}, tmp_path / "pytorch_model.bin")
    tensors = read_checkpoint(tmp_path)
    assert tensors["a"].offset == tensors["tied"].offset


def test_shards(tmp_path: Path) -> None:
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in files.items():
        torch.save({name: STATE[name]}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert list(read_checkpoint(tmp_path)) == ["a", "b"]
    index.write_text(json.dumps({"weight_map": {**files, "b": "../x.bin"}}))
    with pytest.raises(CheckpointError, match="outside of its directory"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {**files, "c": files["a"]}}))
    with pytest.raises(CheckpointError, match=r"lacks tensors that the index places there\n.*\n  expected: c"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("root", [[1], {"a": [torch.ones(1)]}, {1: torch.ones(1)}, torch.ones(1)])
def test_no_state_dict(tmp_path: Path, root: object) -> None:
    torch.save(root, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"state dict"):
        read_checkpoint(tmp_path)


def test_files_of_torch_before_1_6(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"hint: .*torch 1\.6 or later"):
        read_checkpoint(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        read_checkpoint(tmp_path)
