"""The target, the disk and other processes: one clear message, and what to do to go on."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardtool.families.blocks import axis_sizes
from shardtool.families.registry import family_of
from shardtool.formats import safetensors_files
from shardtool.layout.huggingface import huggingface_layout
from spoiled import CONFIG, Copied, Meanwhile, Refused, TinyModel


def test_another_process_works_on_the_same_target(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    stage = tmp_path / ".dst.shardtool"
    stage.mkdir()
    with (stage / "lock").open("w") as lock:
        lock.write("process 4711 on elsewhere\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("another process", "4711"))


def test_a_model_that_no_disk_holds(refused: Refused, tmp_path: Path) -> None:
    """Of which only the header is there."""
    source = tmp_path / "source"
    source.mkdir()
    config = {**json.loads(CONFIG.read_text()), "vocab_size": 1 << 34, "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    family = family_of(config)
    a = family.read_config(config)
    layout = huggingface_layout(family.rules(a), axis_sizes(a))
    skeleton = safetensors_files.skeleton([(key[1], layout.shape(piece), "float16") for key, piece in layout.tensors()])
    with (source / "model.safetensors").open("wb") as file:
        file.write(skeleton.parts[0][1])
        file.truncate(skeleton.size)
    refused(2, "hf2megatron", source, tmp_path / "dst", names=("not enough disk space", "bytes free"))


def test_a_file_system_that_cannot_share_blocks(tiny_model: TinyModel, refused: Refused) -> None:
    """/dev/shm is memory; and source and target are on two file systems."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        dst = Path(directory) / "dst"
        refused(2, "hf2megatron", tiny_model("llama"), dst, "--reflink", names=("cannot be shared", "--reflink"))
        assert not list(Path(directory).iterdir())


@pytest.fixture
def small_files() -> Iterator[None]:
    """No process here may write a file of more than 200 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_takes_no_more(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("the system refused", "File too large"))


def test_a_directory_that_may_not_be_written_to(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    """/proc takes no directories, whoever asks."""
    refused(2, "hf2megatron", tiny_model("llama"), "/proc/dst", names=("cannot be made", "/proc/dst"))


def test_the_source_changes_during_the_conversion(
    tiny_model: TinyModel, copied: Copied, meanwhile: Meanwhile, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    meanwhile("journal-0.new", 1, lambda: os.utime(source / "model.safetensors"))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source / "model.safetensors", "changed"))


def test_a_file_vanishes_while_it_is_looked_at(
    tiny_model: TinyModel, copied: Copied, meanwhile: Meanwhile, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    weights = source / "model.safetensors"
    for times in (1, 2):  # when its header is read, when it is identified
        meanwhile(weights.name, times, lambda: weights.rename(source / "aside"))
        refused(1, "hf2megatron", source, tmp_path / "dst", names=(weights, "cannot be read"), keep=True)
        (source / "aside").rename(weights)


def test_the_config_vanishes_during_the_conversion(
    tiny_model: TinyModel, copied: Copied, meanwhile: Meanwhile, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    meanwhile("journal-0.new", 1, (source / "config.json").unlink)
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source / "config.json",), keep=True)


def test_the_weights_vanish_during_the_conversion(
    tiny_model: TinyModel, copied: Copied, meanwhile: Meanwhile, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    meanwhile("journal-0.new", 1, lambda: (source / "model.safetensors").rename(source / "aside"))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source / "model.safetensors",), keep=True)


def test_the_weights_shrink_during_the_conversion(
    tiny_model: TinyModel, copied: Copied, meanwhile: Meanwhile, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    meanwhile("journal-0.new", 1, lambda: os.truncate(source / "model.safetensors", 100_000))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source / "model.safetensors", "cut off"), keep=True)


def test_interrupted_with_ctrl_c(tiny_model: TinyModel, meanwhile: Meanwhile, refused: Refused, tmp_path: Path) -> None:
    meanwhile("journal-0.new", 1, lambda: signal.raise_signal(signal.SIGINT))
    refused(130, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("nothing was left behind",))
    meanwhile("output/release/.metadata", 1, lambda: signal.raise_signal(signal.SIGINT))
    refused(130, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("finished files kept",), keep=True)


def test_interrupted_before_the_work_begins(
    tiny_model: TinyModel, meanwhile: Meanwhile, refused: Refused, tmp_path: Path
) -> None:
    meanwhile("llama/config.json", 1, lambda: signal.raise_signal(signal.SIGINT))
    refused(130, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("nothing was left behind",))
