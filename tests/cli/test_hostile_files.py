"""Broken and hostile safetensors files, indices, configs and values. Among them is what scripts/fuzz has found."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import command, convert, done
from shardtool import tiny
from spoiled import CONFIG, NORM, RANK_FILE, Copied, Megatron, Refused, TinyModel, edit, edit_config


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object], payload: bytes = b"") -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    made = change(header)
    text = (made if isinstance(made, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :] + payload)


def twice(header: dict[str, Any]) -> str:
    return json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}' + "}"


def entry(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NORM].__setitem__(name, value)


MIDDLE = "model.layers.1.input_layernorm.weight"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "offsets that overlap": (lambda h: h[NORM].update(data_offsets=[0, 256]), "lm_head.weight"),
    "offsets far beyond the file": (entry("data_offsets", [2**62, 2**62 + 256]), NORM),
    "offsets beyond 64 bits": (entry("data_offsets", [2**64, 2**64 + 256]), NORM),
    "offsets just beyond the file": (lambda h: h[NORM].update(shape=[65], data_offsets=[555008, 555268]), NORM),
    "offsets that are negative": (entry("data_offsets", [-256, 0]), NORM),
    "offsets that end before they begin": (entry("data_offsets", [555264, 555008]), NORM),
    "a hole at the end": (lambda h: h.pop(NORM) and None, "256 bytes at the end"),
    "a hole in the middle": (
        lambda h: h.pop(MIDDLE) and None,
        "model.safetensors: model.layers.1.mlp.down_proj.weight",
    ),
    "a changed bit in a name": (lambda h: h.__setitem__("model.norm.weighu", h.pop(NORM)), "missing: " + NORM),
    "a name twice": (twice, NORM),
    "a key twice within an entry": (lambda h: json.dumps(h).replace('"shape"', '"dtype"', 1), "occurs twice"),
    "a number of thousands of digits": (lambda h: json.dumps(h).replace("[64]", "[" + "9" * 10_000 + "]", 1), "digits"),
    "an unknown dtype": (entry("dtype", "F7"), NORM),
    "a dtype of another width": (entry("dtype", "F16"), NORM),
    "a shape of another size": (entry("shape", [65]), NORM),
    "a shape that overflows": (entry("shape", [2**62, 2**62]), NORM),
    "a shape that is no list": (entry("shape", "64"), NORM),
    "a name with line breaks": (lambda h: h.__setitem__("a\nb\x1b[31mc", h.pop(NORM)), "\\n"),
    "deep JSON": (lambda _: '{"a":' + "[" * 100_000, "cannot be read"),
    "not UTF-8": (lambda _: '{"\udcff": 1}', "byte 2 is not UTF-8"),
    "many small values": (lambda _: '{"a":[' + "[],[],[]," * 1_100_000 + "]}", "too large"),
    "metadata that is no table": (lambda h: h.__setitem__("__metadata__", [1]), "__metadata__"),
    "an entry without a shape": (lambda h: h[NORM].pop("shape") and None, NORM),
    "NaN": (lambda h: json.dumps(h).replace("[64]", "NaN"), "NaN"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_header_with(
    case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    change, name = HEADERS[case]
    rewrite_header(source / "model.safetensors", change)
    file = source / "model.safetensors"
    of_the_model = case in ("a changed bit in a name", "a name with line breaks")  # the file is in order
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source if of_the_model else file, name))


@pytest.mark.parametrize("case", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_a_length(
    case: int, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", case) + path.read_bytes()[8:])
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(path, "header"))


FILES = {
    "model.safetensors": "", "config.json": "", "pytorch_model.bin": "", RANK_FILE: "torch", "common.pt": "torch_dist",
    "metadata.json": "torch_dist", ".metadata": "torch_dist", "__0_0.distcp": "torch_dist",
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_cut_off(
    case: str, tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    """Whatever is left of the file, down to nothing."""
    source = copied(megatron("llama", FILES[case]) if FILES[case] else tiny_model("llama"))
    if case == "pytorch_model.bin":
        torch.save(load_file(source / "model.safetensors"), source / case)
        (source / "model.safetensors").unlink()
    (path,) = source.rglob(case)
    data = path.read_bytes().rstrip()
    for length in (len(data) - 1, len(data) // 2, 9, 0):
        path.write_bytes(data[:length])
        refused(1, "megatron2hf" if FILES[case] else "hf2megatron", source, tmp_path / "dst", names=(path,))


def test_a_safetensors_file_that_begins_with_something_else(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    path = source / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b" " + data[9:])
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(path, "begin with {"))


def test_a_directory_in_the_place_of_a_file(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source / "model.safetensors", "a directory"))


def test_a_link_that_leads_to_itself(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    (source / "model.safetensors.index.json").symlink_to("model.safetensors.index.json")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source / "model.safetensors.index.json",))


def test_a_config_that_is_no_table(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    (source / "config.json").write_text("[1]")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source / "config.json", "no object"))


def test_a_config_of_many_megabytes(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    os.truncate(source / "config.json", 17 << 20)
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source / "config.json", "too large"))


def test_tensors_whose_names_differ_in_case(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "LM_head.weight": tensors["lm_head.weight"].clone()}, source / "model.safetensors")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("not known to this architecture: LM_head.weight",))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(
        json.loads(CONFIG.read_text()), tmp_path_factory.mktemp("tiny") / "sharded", max_shard_size="100KB"
    )


def first_of(index: dict[str, Any], file: str) -> str:
    """The first tensor of a file."""
    return min(name for name, holder in index["weight_map"].items() if holder == file)


def some_file(index: dict[str, Any]) -> str:
    return sorted(index["weight_map"].values())[0]


def rename(name: str) -> Callable[[Path, dict[str, Any]], None]:
    def change(_: Path, index: dict[str, Any]) -> None:
        index["weight_map"][NORM] = name

    return change


def linked(source: Path, index: dict[str, Any]) -> None:
    file = source / some_file(index)
    file.rename(source.parent / "elsewhere")
    file.symlink_to("../elsewhere")


def twins(_: Path, index: dict[str, Any]) -> None:
    index["weight_map"][NORM] = some_file(index).upper()


def single(source: Path, index: dict[str, Any]) -> None:
    shutil.copyfile(source / some_file(index), source / "model.safetensors")


INDICES: dict[str, tuple[Callable[[Path, dict[str, Any]], object], str]] = {
    "an absolute path": (rename("/etc/passwd"), "outside of its directory"),
    "a path upwards": (rename("../model.safetensors"), "outside of its directory"),
    "a path with backslashes": (rename("..\\model.safetensors"), "outside of its directory"),
    "no file's name": (rename(""), "outside of its directory"),
    "a number for a file": (lambda _, i: i["weight_map"].update({NORM: 7}), "a number"),
    "a file that is not there": (rename("model-00099-of-00099.safetensors"), "model-00099-of-00099.safetensors"),
    "a tensor in another shard": (
        lambda _, i: i["weight_map"].update({NORM: i["weight_map"]["model.embed_tokens.weight"]}), NORM
    ),
    "a tensor that is nowhere": (lambda _, i: i["weight_map"].update(stray=some_file(i)), "stray"),
    "a tensor left out": (lambda _, i: i["weight_map"].pop(NORM), NORM),
    "a link out of the directory": (linked, "leads out of the checkpoint"),
    "names that differ in case": (twins, "upper and lower case"),
    "no weight_map": (lambda _, i: i.pop("weight_map") and None, "weight_map"),
    "a second set of weights": (single, "two sets of weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDICES)
def test_an_index_with(case: str, sharded: Path, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(sharded)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change, name = INDICES[case]
    tensor = {"a link out of the directory": first_of(index, some_file(index)), "a tensor that is nowhere": "stray"}
    change(source, index)
    path.write_text(json.dumps(index))
    of_all = case in ("no weight_map", "a second set of weights")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(name, "" if of_all else tensor.get(case, NORM)))


def test_a_pipe_in_the_place_of_a_file(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    os.mkfifo(source / "model.safetensors.index.json")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("model.safetensors.index.json",))
    shutil.rmtree(source)
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    (source / "release" / ".metadata").unlink()
    os.mkfifo(source / "release" / ".metadata")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(".metadata",))


@pytest.mark.parametrize(
    "case",
    [
        "num_hidden_layers of a billion",
        "head_dim of a table",
        "rms_norm_eps of NaN",
    ],
)
def test_a_config_with(case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    values: dict[str, object] = {"a billion": 10**9, "a table": {"a": 1}, "NaN": float("nan")}
    name, _, value = case.partition(" of ")
    source = edit_config(copied(tiny_model("llama")), **{name: values[value]})
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("config.json",))


def test_a_tokenizer_that_is_a_link_to_another_file(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    other = copied(tiny_model("llama"))
    (tmp_path / "secret").write_text("secret")
    (other / "tokenizer.json").symlink_to("../secret")
    arguments = ("megatron2hf", megatron("llama"), tmp_path / "dst", "--hf", other)
    refused(1, *arguments, names=("tokenizer.json", "leads out"))


def test_weights_that_are_no_numbers(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    tensors = load_file(source / "model.safetensors")
    tensors[NORM][:3] = float("nan")
    tensors["lm_head.weight"][5, 6] = float("-inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    names = (
        f"{NORM}: 3 NaN of 64 elements",
        source / "model.safetensors",
        "lm_head.weight: 1 Inf of 7680 elements",
        "--allow-nan",
    )
    refused(1, "inspect", source, "--values", names=names)
    assert "3 NaN" in done("inspect", source, "--values", "--allow-nan").out
    assert "3 NaN" in done("hf2megatron", source, tmp_path / "allowed", "--allow-nan", "--tp", 2).out
    convert(source, tmp_path / "not looked at", "--no-checksums")
    tensors["lm_head.weight"][5, 6] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for options in ((), ("--dtype", "bf16")):
        refused(1, "hf2megatron", source, tmp_path / "dst", *options, names=names[:2])


@pytest.mark.parametrize("case", ["torch", "torch_dist"])
def test_weights_that_megatron_core_has_saved_and_that_are_no_numbers_in_format(
    case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    edit(source, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"].view(-1)[-1:].fill_(float("nan")))
    made = convert(source, tmp_path / "made", "--format", case, "--tp", 2, "--allow-nan")
    name = (
        "decoder.layers.1.self_attention.linear_proj.weight"
        if case == "torch"
        else "decoder.layers.self_attention.linear_proj.weight"
    )
    file = f"mp_rank_01/{RANK_FILE}" if case == "torch" else "1 NaN"
    for arguments in (("megatron2hf", made, tmp_path / "dst"), ("reshard", made, tmp_path / "dst", "--pp", 2)):
        refused(1, *arguments, names=(name, file, "1 NaN of"))


@pytest.mark.parametrize("name", ["self_attn.o_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm"])
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_one_weight_that_is_no_number(
    name: str, form: str, tiny_model: TinyModel, copied: Copied, tmp_path: Path
) -> None:
    """Wherever it comes to lie: among columns that are scattered, rows that are woven, or in every rank's copy."""
    source = copied(tiny_model("llama"))
    tensors = load_file(source / "model.safetensors")
    wrong = f"model.layers.2.{name}.weight"
    tensors[wrong].view(-1)[-1] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = command("hf2megatron", source, tmp_path / "dst", "--tp", 2, "--pp", 2, "--format", form)
    assert result.code == 1
    assert f"{wrong}: 1 Inf of {tensors[wrong].numel()} elements" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_values_that_the_dtype_cannot_hold(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    tensors = load_file(source / "model.safetensors")
    tensors[NORM][0] = 70000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    names = (f"{NORM}: 1 of 64 elements beyond the range of the dtype",)
    refused(1, "hf2megatron", source, tmp_path / "dst", "--dtype", "fp16", names=names)
    convert(source, tmp_path / "bf16", "--dtype", "bf16")
