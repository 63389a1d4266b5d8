"""Blocks shared with the source: payloads begin where it needs them, and the bytes are the same as without."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from commands import command, done
from shardtool import tiny
from shardtool.formats import safetensors_files, torch_dist_out, torch_zip_out
from shardtool.formats.pickle_out import TensorOut
from shardtool.formats.stored import BLOCK

CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "llama.json"
RESIDUES = st.lists(st.integers(-1, BLOCK - 1), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(RESIDUES)
def test_records_of_an_archive(wanted: list[int]) -> None:
    tensors = {f"w{n}": TensorOut(n, "float32", (n + 3,), residue) for n, residue in enumerate(wanted)}
    archive = torch_zip_out.skeleton(OrderedDict(tensors))
    values = [torch.arange(n + 3, dtype=torch.float32) + n for n in range(len(wanted))]
    for number, residue in enumerate(wanted):
        offset = archive.payload[number].offset
        assert offset % BLOCK == residue if residue >= 0 else offset % 64 == 0
    data = torch_zip_out.fill(archive, {n: bytes(value.numpy().tobytes()) for n, value in enumerate(values)})
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert all(torch.equal(loaded[f"w{n}"], value) for n, value in enumerate(values))


@settings(max_examples=40, deadline=None)
@given(RESIDUES)
def test_blobs_of_a_distcp_file(wanted: list[int]) -> None:
    items = [("w", (n,), (n + 3,), "bfloat16") for n in range(len(wanted))]
    held = {("w", (n,)): residue for n, residue in enumerate(wanted) if residue >= 0}
    file, extents = torch_dist_out.data_file_skeleton(items, [("state", b"x" * 77)], held)
    payload = {key: bytes(place.nbytes) for key, place in file.payload.items()}
    data = torch_zip_out.fill(file, payload)
    for (name, offsets, shape, _), (position, length) in zip(items, extents, strict=False):
        if (name, offsets) in held:
            assert file.payload[name, offsets].offset % BLOCK == held[name, offsets]
        loaded = torch.load(io.BytesIO(data[position : position + length]), weights_only=True)
        assert tuple(loaded.shape) == shape


@settings(max_examples=40, deadline=None)
@given(st.integers(0, BLOCK // 8 - 1))
def test_the_data_of_a_safetensors_file(eighths: int) -> None:
    tensors = [("small", (3,), "float32"), ("large", (5000,), "float32")]
    file = safetensors_files.skeleton(tensors, residues={"large": 8 * eighths, "small": 1})
    if (8 * eighths - 12) % 8 == 0:
        assert file.payload["large"].offset % BLOCK == 8 * eighths
    file = safetensors_files.skeleton(tensors[1:], residues={"large": 8 * eighths})
    assert file.payload["large"].offset % BLOCK == 8 * eighths
    data = torch_zip_out.fill(file, {"large": bytes(20000)})
    assert torch.equal(load(data)["large"], torch.zeros(5000))


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a file system that shares blocks: an image that is mounted for this module."""
    place, image = tmp_path_factory.mktemp("sharing"), tmp_path_factory.mktemp("image") / "image"
    make = next((found for name in ("mkfs.xfs", "mkfs.btrfs") if (found := shutil.which(name, path=SBIN))), None)
    if make is None or os.geteuid() != 0:
        pytest.skip("nobody here can make a file system with reflinks: it takes root, and mkfs.xfs or mkfs.btrfs")
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([make, "-q", str(image)], check=True, capture_output=True)
    mounted = subprocess.run(
        ["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no image can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def free(place: Path) -> int:
    os.sync()
    found = os.statvfs(place)
    return found.f_bfree * found.f_frsize


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_most_blocks_are_shared(form: str, sharing: Path) -> None:
    """A split into pipeline stages, and back: a tenth of the space, the same tensors, checksums as written."""
    model = sharing / f"model-{form}"
    config = json.loads(CONFIG.read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 2048, "head_dim": 64}
    tiny.build(config, model, dtype="bfloat16")
    size, there, back = (
        (model / "model.safetensors").stat().st_size,
        sharing / f"there-{form}",
        sharing / f"back-{form}",
    )
    for source, arguments in (
        (model, ("hf2megatron", model, there, "--pp", 2, "--format", form)),
        (there, ("megatron2hf", there, back)),
    ):
        before = free(sharing)
        target = arguments[2]
        done(*arguments, "--reflink")
        assert before - free(sharing) < size / 5, "its blocks are its own"
        assert command("diff", source, target).code == 0
        done("verify", "--checksums", target)
        shutil.rmtree(sharing / "plain", ignore_errors=True)
        done(*arguments[:2], sharing / "plain", *arguments[3:])
        assert command("diff", sharing / "plain", target).code == 0
    assert (model / "model.safetensors").stat().st_size == size


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_without_checksums_nothing_is_read(form: str, sharing: Path) -> None:
    """Then archives have no CRC32, as torch writes them where it is told to; torch loads them, and they say it."""
    model, plain, there = sharing / f"bare-{form}", sharing / f"bare-plain-{form}", sharing / f"bare-there-{form}"
    tiny.build(json.loads(CONFIG.read_text()) | {"vocab_size": 4096, "hidden_size": 512}, model, dtype="bfloat16")
    split = ("hf2megatron", model)
    done(*split, plain, "--pp", 2, "--format", form, "--reflink")
    out = done(*split, there, "--pp", 2, "--format", form, "--reflink", "--no-checksums")
    assert "no CRC32" in out.out
    assert command("diff", plain, there).code == 0
    if form == "torch":
        for file in sorted(there.rglob("*.pt")):
            with zipfile.ZipFile(file) as archive:
                bare = {entry.filename for entry in archive.infolist() if entry.file_size > BLOCK and not entry.CRC}
            assert any("/data/" in name for name in bare)
            theirs = torch.load(plain / file.relative_to(there), weights_only=False)["model"]
            for mapped in (False, True):
                ours = torch.load(file, weights_only=False, mmap=mapped)["model"]
                assert all(torch.equal(ours[name], value) for name, value in theirs.items() if value is not None)
