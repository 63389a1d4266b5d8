"""The manifest: what it holds, that others do not mind it, and what `verify --checksums` finds."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from commands import command, done
from shardtool import __version__
from shardtool.checkpoint.huggingface import open_huggingface
from shardtool.checkpoint.identity import END_BYTES, identify
from shardtool.manifest import MANIFEST, command_line

TinyModel = Callable[[str], Path]
Megatron = Callable[..., Path]


@pytest.fixture
def copied(megatron: Megatron, tmp_path: Path) -> Path:
    """A converted checkpoint, to be spoiled."""
    return shutil.copytree(megatron("llama", "torch_dist", "te", 2, 2), tmp_path / "copy")


def content(directory: Path) -> dict:
    return json.loads((directory / MANIFEST).read_text())


def test_what_it_holds(tiny_model: TinyModel, megatron: Megatron) -> None:
    directory = megatron("llama", "torch_dist", "te", 2, 2)
    found = content(directory)
    assert found["versions"]["shardtool"] == __version__
    assert found["command"].startswith(
        f"shardtool hf2megatron {tiny_model('llama')} DST --tp 2 --pp 2 --format torch_dist"
    )
    assert (
        found["plan_digest"]
        == done("plan", *found["command"].split()[1:3], *found["command"].split()[4:], "--json").json["digest"]
    )
    files = {file.relative_to(directory).as_posix(): file for file in directory.rglob("*") if file.is_file()}
    assert found["files"].keys() == files.keys() - {MANIFEST}
    for name, entry in found["files"].items():
        data = files[name].read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert found["source"]["path"] == str(tiny_model("llama"))
    assert found["source"]["files"].keys() == {"config.json", "model.safetensors"}


def test_the_sums_are_those_of_sha256sum(megatron: Megatron) -> None:
    directory = megatron("llama")
    names = list(content(directory)["files"])
    sums = subprocess.run(["sha256sum", *names], cwd=directory, capture_output=True, text=True, check=True).stdout
    assert {line.split("  ")[1]: line.split()[0] for line in sums.splitlines()} == {
        name: entry["sha256"] for name, entry in content(directory)["files"].items()
    }


def test_tensor_digests(tiny_model: TinyModel, megatron: Megatron, tmp_path: Path) -> None:
    """Of the values as they are in memory, little-endian and row by row."""
    done("megatron2hf", megatron("llama"), tmp_path / "hf", "--tensor-digests", "-q")
    (entry,) = [e for e in content(tmp_path / "hf")["files"].values() if "tensors" in e]
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert {tensor["name"] for tensor in entry["tensors"]} == set(file.keys())
        for tensor in entry["tensors"]:
            value = file.get_tensor(tensor["name"])
            assert (tensor["dtype"], tensor["shape"]) == (str(value.dtype).removeprefix("torch."), list(value.shape))
            assert tensor["sha256"] == hashlib.sha256(value.numpy().tobytes()).hexdigest()
    for form in ("torch", "torch_dist"):
        done("hf2megatron", tiny_model("llama"), tmp_path / form, "--tp", 2, "--format", form, "--tensor-digests", "-q")
    by_form = [
        sorted((t["name"], t["sha256"]) for entry in content(tmp_path / form)["files"].values() for t in entry.get("tensors", ()))
        for form in ("torch", "torch_dist")
    ]  # fmt: skip
    norm = "decoder.final_layernorm.weight"
    assert next(digest for name, digest in by_form[0] if name == norm) in {d for n, d in by_form[1] if n == norm}


def test_without_checksums(tiny_model: TinyModel, tmp_path: Path) -> None:
    done("hf2megatron", tiny_model("llama"), tmp_path / "a", "--no-checksums", "-q")
    assert all(entry.keys() == {"size"} for entry in content(tmp_path / "a")["files"].values())
    result = command("verify", "--checksums", tmp_path / "a")
    assert result.code == 2
    assert "no checksums" in result.err
    result = command("hf2megatron", tiny_model("llama"), tmp_path / "b", "--no-checksums", "--tensor-digests")
    assert result.code == 2
    assert "exclude each other" in result.err


def test_a_directory_as_it_was_written(megatron: Megatron) -> None:
    directory = megatron("llama", "torch_dist", "te", 2, 2)
    result = done("verify", "--checksums", directory)
    assert result.out.endswith("as written\n")
    assert done("verify", "--checksums", directory, "--json").json["same"] is True


def test_missing_extra_and_changed_files_are_named(copied: Path) -> None:
    (copied / "release" / ".metadata").unlink()
    (copied / "release" / "extra").write_text("x")
    (copied / "release" / "folder").symlink_to(copied)
    changed = copied / "release" / "__0_0.distcp"
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    with (copied / "release" / "common.pt").open("ab") as file:
        file.write(b"x")
    result = command("verify", "--checksums", copied)
    assert result.code == 1
    assert result.out.splitlines()[:-1] == [
        "missing: release/.metadata", "extra: release/extra", "extra: release/folder",
        "changed: release/__0_0.distcp", "changed: release/common.pt",
    ]  # fmt: skip
    assert "NOT as written" in result.out
    found = command("verify", "--checksums", copied, "--json").json
    assert (found["same"], found["missing"]) == (False, ["release/.metadata"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["files"].update({"../../secret": {"size": 1, "sha256": "ab"}}), "outside the directory"),
        (lambda data: data["files"].update({"/etc/passwd": {"size": 1, "sha256": "ab"}}), "outside the directory"),
        (lambda data: data.update(files=[1]), "damaged"),
        (lambda data: data.update(files={"a": 3}), "damaged"),
        (lambda data: data.update(files={"a": {"size": None}}), "damaged"),
        (lambda data: data.update(shardtool_manifest=9), "damaged"),
        (lambda data: data.pop("files"), "damaged"),
    ],
)
def test_a_damaged_manifest(copied: Path, change: Callable[[dict], object], says: str) -> None:
    data = content(copied)
    change(data)
    (copied / MANIFEST).write_text(json.dumps(data))
    result = command("verify", "--checksums", copied)
    assert result.code == 1
    assert says in result.err
    assert str(copied / MANIFEST) in result.err


def test_no_manifest(tiny_model: TinyModel) -> None:
    assert "no shardtool.json" in command("verify", "--checksums", tiny_model("llama")).err


def test_verify_needs_two_or_checksums(megatron: Megatron) -> None:
    for arguments in (["verify"], ["verify", megatron("llama")], ["verify", megatron("llama"), "--checksums", "x"]):
        assert command(*arguments).code == 2


def test_others_do_not_mind_it(megatron: Megatron, tmp_path: Path) -> None:
    """transformers, and our own readers; Megatron-LM looks into the root for its tracker alone."""
    done("megatron2hf", megatron("llama"), tmp_path / "hf", "-q")
    assert (tmp_path / "hf" / MANIFEST).exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).config.num_hidden_layers == 4
    for directory in (tmp_path / "hf", megatron("llama")):
        assert done("inspect", directory, "--json").json["problem"] is None


def test_the_command_says_all_that_shapes_the_output() -> None:
    options = {"tp": 2, "etp": None, "account_for_loss": True, "account_for_embedding": False, "vocab_pad": "mean"}
    words = command_line("hf2megatron", "a b", options)
    assert words == ["shardtool", "hf2megatron", "a b", "DST", "--tp", "2", "--account-for-loss", "--vocab-pad", "mean"]


def test_the_identity_of_a_source(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Size, time and both ends; the description whole. A copy is the same for a manifest and another for a journal."""
    source = shutil.copytree(tiny_model("llama"), tmp_path / "one")
    (source / "README.md").write_text("no part of it")
    first = identify(open_huggingface(source).opened)
    assert [file.name for file in first.files] == ["config.json", "model.safetensors"]
    data = (source / "model.safetensors").read_bytes()
    assert first.files[1].sha256 == hashlib.sha256(data[:END_BYTES] + data[-END_BYTES:]).hexdigest()
    other = identify(open_huggingface(shutil.copytree(source, tmp_path / "two")).opened)
    assert other.as_dict()["files"] == first.as_dict()["files"]
    assert other.key() != first.key()
    first.check_unchanged()
    (source / "README.md").write_text("still none")
    first.check_unchanged()
