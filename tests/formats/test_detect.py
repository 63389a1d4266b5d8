"""What kind of checkpoint a directory is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from filled import DATA
from shardtool.errors import CheckpointError
from shardtool.formats.detect import detect


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    return root


@pytest.mark.parametrize("root", sorted(DATA.glob("*/*/torch*")), ids=lambda path: "-".join(path.parts[-3:]))
def test_megatron(root: Path) -> None:
    kind = {"torch": "megatron_torch", "torch_dist": "megatron_torch_dist"}[root.name]
    for path in (root, root / "iter_0000100"):
        found = detect(path)
        assert (found.kind, found.directory, found.iteration) == (kind, root / "iter_0000100", 100)
        assert not found.release


def test_hugging_face(tmp_path: Path) -> None:
    assert detect(made(tmp_path / "a", "config.json", "model.safetensors")).kind == "hf_safetensors"
    assert detect(made(tmp_path / "b", "config.json", "model.safetensors.index.json")).kind == "hf_safetensors"
    assert detect(made(tmp_path / "c", "config.json", "pytorch_model.bin")).kind == "hf_bin"
    assert detect(made(tmp_path / "d", "config.json", "pytorch_model.bin.index.json")).kind == "hf_bin"
    both = detect(made(tmp_path / "e", "config.json", "pytorch_model.bin", "model.safetensors"))
    assert both.kind == "hf_safetensors" and both.directory == tmp_path / "e"


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        detect(path)
    return str(error.value)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "a file" in message(made(tmp_path, "x.txt") / "x.txt")
    assert "nothing" in message(tmp_path / "absent")
    empty = message(made(tmp_path / "empty", "x"))
    assert "config.json" in empty and "latest_checkpointed_iteration.txt" in empty and "found: x" in empty
    assert "hint: copy config.json" in message(made(tmp_path / "w", "model.safetensors"))
    assert "hint: name the save itself" in message(made(tmp_path / "i", "iter_0000001/x", "iter_0000002/x"))
    (tmp_path / "void").mkdir()
    assert "an empty directory" in message(tmp_path / "void")


def test_other_backends_are_named(tmp_path: Path) -> None:
    zarr = made(tmp_path / "zarr" / "iter_0000001", "x")
    (zarr / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert "zarr" in message(zarr)
    assert "fsdp_dtensor" in message(made(tmp_path / "iter_0000002", ".metadata"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metadata.json").write_text("{broken")
    assert "metadata.json" in message(tmp_path / "bad")


def test_formats_import_no_framework() -> None:
    code = (
        "import sys, pkgutil, importlib, shardtool.formats as f\n"
        "for m in pkgutil.iter_modules(f.__path__): importlib.import_module('shardtool.formats.' + m.name)\n"
        "print([n for n in ('torch', 'numpy', 'transformers', 'megatron', 'safetensors') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
