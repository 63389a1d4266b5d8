"""A conversion that changes no values needs a few buffers, whatever the size of the model."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from shardtool.execute.memory import Memory
from shardtool.families.blocks import axis_sizes
from shardtool.families.registry import family_of
from shardtool.formats import safetensors_files
from shardtool.layout.huggingface import huggingface_layout

LIMIT = 128 << 20  # RLIMIT_DATA of the process: less than the model has
PEAK = 64 << 20
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 8192,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8000,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """260 MB of zeros, which are a hole in the file."""
    folder = tmp_path_factory.mktemp("limits") / "hf"
    folder.mkdir()
    family = family_of(CONFIG)
    a = family.read_config(CONFIG)
    layout = huggingface_layout(family.rules(a), axis_sizes(a))
    skeleton = safetensors_files.skeleton(
        [(key[1], layout.shape(piece), "bfloat16") for key, piece in layout.tensors()]
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(skeleton.parts[0][1])
        file.truncate(skeleton.size)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def limited(*arguments: object) -> dict:
    """A command under the limit; its summary."""
    done = subprocess.run(
        [sys.executable, "-m", "shardtool", *map(str, arguments), "--json", "-q"], capture_output=True, text=True,
        check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_memory_does_not_follow_the_size_of_the_model(tmp_path, model, form):
    there = limited("hf2megatron", model, tmp_path / "a", "--tp", 4, "--pp", 2, "--format", form)
    assert there["bytes_written"] > 2 * LIMIT * 0.9
    moved = limited("reshard", tmp_path / "a", tmp_path / "b", "--tp", 2, "--pp", 4)
    back = limited("megatron2hf", tmp_path / "b", tmp_path / "c")
    assert max(run["peak_memory"] for run in (there, moved, back)) < PEAK


def test_anonymous_memory_is_what_was_allocated():
    """In a process of its own: the tests' has free memory that an allocation may take."""
    code = (
        "from shardtool.execute.memory import anonymous_memory; before = anonymous_memory(); "
        "held = bytearray(b'x' * (32 << 20)); print(anonymous_memory() - before - len(held))"
    )
    more = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert more >= -(1 << 20)


def test_looks_that_follow_closely_are_one():
    memory = Memory()
    first = memory.look()
    held = bytearray(b"x" * (32 << 20))
    assert memory.look() == first
    assert len(held) > 0
