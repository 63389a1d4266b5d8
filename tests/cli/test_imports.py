"""What a command imports: torch, transformers and megatron-core take seconds, and most commands need none of them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HEAVY = {"torch", "transformers", "megatron"}
PROGRAM = """
import json, sys
from shardtool.cli.main import run
code = 0
try:
    run(sys.argv[2:])
except SystemExit as stop:
    code = stop.code or 0
modules = sorted({name.split(".")[0] for name in sys.modules})
open(sys.argv[1], "w").write(json.dumps({"code": code, "modules": modules}))
"""

TinyModel = Callable[[str], Path]
Megatron = Callable[..., Path]


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., set[str]]:
    """The top-level modules that a command has imported when it ends."""

    def run(*arguments: object) -> set[str]:
        report = tmp_path / "report.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        command = [sys.executable, "-c", PROGRAM, str(report), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        found = json.loads(report.read_text())
        assert found["code"] == 0, done.stderr
        return set(found["modules"])

    return run


Imported = Callable[..., set[str]]


def test_the_check_sees_what_is_imported(imported: Imported, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    assert {"torch", "transformers"} <= imported("verify", model, model, "--max-tokens", 8)


def test_help(imported: Imported) -> None:
    assert not imported("--help") & {*HEAVY, "numpy", "ml_dtypes", "rich"}
    assert not imported("hf2megatron", "--help") & {*HEAVY, "numpy", "ml_dtypes"}
    assert not imported("--version") & HEAVY


def test_help_takes_less_than_0_4_seconds() -> None:
    """Of processor time, the best of three: what else runs on the machine does not count."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "shardtool", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.4


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_plan(form: str, imported: Imported, tiny_model: TinyModel, megatron: Megatron) -> None:
    layout = ("--tp", 2, "--pp", 2, "--format", form)
    assert not imported("plan", "hf2megatron", tiny_model("qwen2"), *layout) & HEAVY
    assert not imported("plan", "reshard", megatron("qwen2", form, "te", 2, 1), *layout) & HEAVY
    assert not imported("plan", "megatron2hf", megatron("qwen2", form, "te", 2, 1), "--json") & HEAVY


def test_inspect(imported: Imported, tiny_model: TinyModel, megatron: Megatron, tmp_path: Path) -> None:
    in_bin = tmp_path / "bin"
    in_bin.mkdir()
    (in_bin / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    torch.save(load_file(tiny_model("llama") / "model.safetensors"), in_bin / "pytorch_model.bin")
    for checkpoint in (tiny_model("llama"), in_bin, megatron("llama"), megatron("llama", "torch_dist", "te", 1, 1)):
        assert not imported("inspect", checkpoint, "-v") & HEAVY
        assert not imported("args", checkpoint) & HEAVY


def test_diff(imported: Imported, tiny_model: TinyModel, megatron: Megatron) -> None:
    assert not imported("diff", tiny_model("llama"), megatron("llama", "torch", "te", 2, 1)) & HEAVY


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_conversions(form: str, imported: Imported, tiny_model: TinyModel, tmp_path: Path) -> None:
    model, a, b = tiny_model("qwen2_tied"), tmp_path / "a", tmp_path / "b"
    assert not imported("hf2megatron", model, a, "--tp", 2, "--format", form, "--vocab-pad", "mean") & HEAVY
    assert not imported("reshard", a, b, "--pp", 2) & HEAVY
    assert not imported("megatron2hf", b, tmp_path / "back", "--hf", model) & HEAVY


def test_casts(imported: Imported, tiny_model: TinyModel, tmp_path: Path) -> None:
    assert not imported("hf2megatron", tiny_model("llama"), tmp_path / "dst", "--dtype", "bf16") & HEAVY
