"""Broken and hostile files, reader by reader: one error that names the file, nothing executed, nothing written.

Among them is what scripts/fuzz has found.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import errors_page
from commands import Result, command, convert, done
from fuzzing.mutations import _doubling as doubling
from shardtool import tiny

TinyModel = Callable[[str], Path]
Megatron = Callable[..., Path]
Refused = Callable[..., Result]
Copied = Callable[[Path], Path]
RANK_FILE = "model_optim_rng.pt"
CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "llama.json"


# --- safetensors -----------------------------------------------------------------------------------------------------


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object], payload: bytes = b"") -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    made = change(header)
    text = (made if isinstance(made, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :] + payload)


NORM = "model.norm.weight"


def twice(header: dict[str, Any]) -> str:
    return json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}' + "}"


def entry(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NORM].__setitem__(name, value)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "offsets that overlap": (lambda h: h[NORM].update(data_offsets=[0, 256]), "overlap"),
    "offsets far beyond the file": (entry("data_offsets", [2**62, 2**62 + 256]), "belong to no tensor"),
    "offsets beyond 64 bits": (entry("data_offsets", [2**64, 2**64 + 256]), NORM),
    "a hole": (lambda h: h.pop(NORM) and None, "belong to no tensor"),
    "a name twice": (twice, NORM),
    "an unknown dtype": (entry("dtype", "F7"), NORM),
    "a dtype of another width": (entry("dtype", "F16"), NORM),
    "a shape of another size": (entry("shape", [65]), NORM),
    "a shape that overflows": (entry("shape", [2**62, 2**62]), NORM),
    "a shape that is no list": (entry("shape", "64"), NORM),
    "a name with line breaks": (lambda h: h.__setitem__("a\nb\x1b[31mc", h.pop(NORM)), "\\n"),
    "deep JSON": (lambda _: '{"a":' + "[" * 100_000, "cannot be read"),
    "not UTF-8": (lambda _: '{"\udcff": 1}', "cannot be read"),
    "many small values": (lambda _: '{"a":[' + "[],[],[]," * 1_100_000 + "]}", "too large"),
    "NaN": (lambda h: json.dumps(h).replace("[64]", "NaN"), "NaN"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_header_with(
    case: str, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    change, name = HEADERS[case]
    rewrite_header(source / "model.safetensors", change)
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(source, name), hint=False)


def test_tensors_whose_names_differ_in_case(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "LM_head.weight": tensors["lm_head.weight"].clone()}, source / "model.safetensors")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("not known to this architecture: LM_head.weight",))


# --- indices ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(
        json.loads(CONFIG.read_text()), tmp_path_factory.mktemp("tiny") / "sharded", max_shard_size="100KB"
    )


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
    "a file that is not there": (rename("model-00099-of-00099.safetensors"), "model-00099-of-00099.safetensors"),
    "a tensor in another shard": (
        lambda _, i: i["weight_map"].update({NORM: i["weight_map"]["model.embed_tokens.weight"]}), NORM
    ),
    "a tensor that is nowhere": (lambda _, i: i["weight_map"].update(stray=some_file(i)), "stray"),
    "a tensor left out": (lambda _, i: i["weight_map"].pop(NORM), NORM),
    "a link out of the directory": (linked, "leads out of the checkpoint"),
    "names that differ in case": (twins, "upper and lower case"),
    "a second set of weights": (single, "two sets of weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDICES)
def test_an_index_with(case: str, sharded: Path, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(sharded)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change, name = INDICES[case]
    change(source, index)
    path.write_text(json.dumps(index))
    refused(1, "hf2megatron", source, tmp_path / "dst", names=(name,), hint=False)


def test_a_pipe_in_the_place_of_a_file(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    os.mkfifo(source / "model.safetensors.index.json")
    refused(1, "hf2megatron", source, tmp_path / "dst", names=("model.safetensors.index.json",), hint=False)
    shutil.rmtree(source)
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    (source / "release" / ".metadata").unlink()
    os.mkfifo(source / "release" / ".metadata")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(".metadata",), hint=False)


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("head_dim", {"a": 1}),
        ("rms_norm_eps", float("nan")),
        ("num_key_value_heads", [1]),
    ],
)
def test_a_config_with(
    name: str, value: Any, tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, name: value}))
    arguments = ("hf2megatron", source, tmp_path / "dst")
    refused(command(*arguments, "-q").code, *arguments, names=("config.json",), hint=False)


def test_a_tokenizer_that_is_a_link_to_another_file(
    tiny_model: TinyModel, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    other = copied(tiny_model("llama"))
    (tmp_path / "secret").write_text("secret")
    (other / "tokenizer.json").symlink_to("../secret")
    arguments = ("megatron2hf", megatron("llama"), tmp_path / "dst", "--hf", other)
    refused(1, *arguments, names=("tokenizer.json", "leads out"), hint=False)


# --- torch archives --------------------------------------------------------------------------------------------------

Records = list[tuple[zipfile.ZipInfo, bytes]]


def repack(path: Path, change: Callable[[Records], object], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(info, archive.read(info)) for info in archive.infolist()]
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for info, data in records:
            archive.writestr(info.filename, data)


def resize(records: Records) -> None:
    at = next(number for number, (info, _) in enumerate(records) if info.filename.endswith("/data/0"))
    records[at] = (records[at][0], records[at][1][:-4])


def pickled(change: Callable[[bytes], bytes]) -> Callable[[Records], None]:
    def apply(records: Records) -> None:
        for number, (info, data) in enumerate(records):
            if info.filename.endswith("data.pkl"):
                records[number] = (info, change(data))

    return apply


def before_stop(added: bytes) -> Callable[[Records], None]:
    return pickled(lambda data: data[:-1] + added + b"0.")


def colliding(count: int) -> bytes:
    return b"}" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"Ns" for n in range(1, count))


ARCHIVES: dict[str, tuple[Callable[[Records], object], str]] = {
    "a record of a wrong size": (resize, "wrong size"),
    "a record that is missing": (lambda r: r.pop(next(n for n, (i, _) in enumerate(r) if "/data/" in i.filename)), "payload"),
    "a record twice": (lambda r: r.append(r[-1]), "twice"),
    "an archive inside": (lambda r: r.insert(0, (zipfile.ZipInfo("a/b/data.pkl"), b"PK")), "out of place"),
    "a name upwards": (lambda r: r.append((zipfile.ZipInfo("../x"), b"")), "out of place"),
    "no pickle": (lambda r: r.pop(0), "no checkpoint"),
    "an unknown persistent id": (before_stop(b"NQ"), "data.pkl"),
    "an import": (before_stop(b"cos\nsystem\n"), "os.system"),
    "a stacked import": (before_stop(b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93"), "os.system"),
    "an instance": (before_stop(b"(ios\nsystem\n"), "0x69"),
    "an object": (before_stop(b"(cos\nsystem\no"), "os.system"),
    "an extension": (before_stop(b"\x82\x01"), "0x82"),
    "a call with keywords": (before_stop(b"cos\nsystem\n)}\x92"), "os.system"),
    "a text persistent id": (before_stop(b"Pos.system\n"), "0x50"),
    "a dict without end": (before_stop(colliding(30_000)), "more than a file of its size"),
    "a million sets": (before_stop(b"(" + b"\x8f" * 1_000_000 + b"t"), "more than a file of its size"),
    "copies of a list": (
        before_stop(b"(" + b"N" * 100_000 + b"lq\xfa0(" + b"c__builtin__\nlist\nh\xfa\x85R" * 3000 + b"t"),
        "more than a file of its size",
    ),
    "a list that unfolds": (before_stop(b"ctorch\nSize\n" + doubling(45) + b"\x85R"), "size is"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_torch_archive_with(case: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    change, name = ARCHIVES[case]
    repack(source / "release" / "mp_rank_00" / RANK_FILE, change)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, name), hint=False)


def test_a_compressed_archive(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    repack(path, lambda records: records.append((zipfile.ZipInfo("x/zeros"), bytes(10**8))), zipfile.ZIP_DEFLATED)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "compressed"))


def test_a_record_that_torch_takes_for_a_folder(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    """torch.load reads such a record as zeros."""
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    data = bytearray(path.read_bytes())
    data[data.rindex(b"model_optim_rng/data/6") - 46 + 38] = 0x10
    path.write_bytes(data)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "data/6", "folder"))


# --- ranks -----------------------------------------------------------------------------------------------------------


def edit_rank(checkpoint: Path, change: Callable[[dict[str, Any]], object], rank: str) -> None:
    (path,) = checkpoint.glob(f"*/{rank}/{RANK_FILE}")
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    "pair", ["mp_rank_00_000 mp_rank_01_000", "mp_rank_00_000 mp_rank_00_001", "mp_rank_00_001 mp_rank_01_001"]
)
def test_ranks_exchanged(pair: str, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 2))
    one, other = (source / "release" / name for name in pair.split())
    one.rename(source / "aside")
    other.rename(one)
    (source / "aside").rename(other)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("in the folder of another rank", one.name))


def test_a_rank_copied_over_another(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 1))
    first, second = (source / "release" / name / RANK_FILE for name in ("mp_rank_00", "mp_rank_01"))
    for rank in ("mp_rank_00", "mp_rank_01"):  # as by a tool that does not write the rank
        edit_rank(source, lambda content: vars(content["args"]).pop("rank"), rank)
    shutil.copyfile(first, second)
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("the same shards", "mp_rank_01", "mp_rank_00"))


@pytest.mark.parametrize(
    ("name", "value"), [("norm_epsilon", 1e-6), ("seed", 7), ("rotary_base", 5000), ("world_size", 64)]
)
def test_a_rank_of_another_run(
    name: str, value: Any, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch", "te", 2, 1))
    edit_rank(source, lambda content: vars(content["args"]).update({name: value}), "mp_rank_01")
    refused(1, "reshard", source, tmp_path / "dst", names=("not of one save", "mp_rank_01"))


def test_another_iteration_than_the_directory(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    for form in ("torch", "torch_dist"):
        source = copied(megatron("llama", form))
        (source / "release").rename(source / "iter_0000500")
        (source / "latest_checkpointed_iteration.txt").write_text("500")
        refused(1, "megatron2hf", source, tmp_path / "dst", names=("iteration 500", "iteration 0"))
        shutil.rmtree(source)


@pytest.mark.parametrize("version", [None, 0, 1.0, float("nan"), "3.0"])
def test_a_checkpoint_version(
    version: Any, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama"))
    edit_rank(source, lambda content: content.update(checkpoint_version=version), "mp_rank_00")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("checkpoint_version", RANK_FILE))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 10**9), ("num_experts", "8"), ("norm_epsilon", float("nan")), ("normalization", 3), ("rotary_base", []),
        ("moe_layer_freq", "([1]*1000000000)"), ("window_size", "ab"), ("kv_channels", -8), ("position_embedding_type", 3),
    ],
)  # fmt: skip
def test_args_with(name: str, value: Any, megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    edit_rank(source, lambda content: vars(content["args"]).update({name: value}), "mp_rank_00")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("args are damaged", name, RANK_FILE), hint=False)


def test_a_rank_that_is_a_link(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama"))
    path = source / "release" / "mp_rank_00" / RANK_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(RANK_FILE, "leads out"), hint=False)


# --- torch_dist ------------------------------------------------------------------------------------------------------


def test_metadata_that_unfolds(megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    path = source / "release" / ".metadata"
    path.write_bytes(b"\x80\x02" + doubling(45) + b".")
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(".metadata",), hint=False)
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=(".metadata",), hint=False)


def test_a_distcp_file_with_another_directory_behind_a_tensor(
    megatron: Megatron, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(megatron("llama", "torch_dist", "te", 1, 1))
    path = source / "release" / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x05\x06", b"PK\x05\x07"))
    refused(1, "megatron2hf", source, tmp_path / "dst", names=("__0_0.distcp",))


# --- values ----------------------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    tensors = load_file(source / "model.safetensors")
    tensors[NORM][:3] = float("nan")
    tensors["lm_head.weight"][5, 6] = float("-inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    names = (f"{NORM}: 3 NaN of 64 elements", "lm_head.weight: 1 Inf of 7680 elements", "--allow-nan")
    refused(1, "inspect", source, "--values", names=names)
    refused(1, "hf2megatron", source, tmp_path / "dst", "--dtype", "bf16", names=names)
    assert "3 NaN" in done("inspect", source, "--values", "--allow-nan").out
    convert(source, tmp_path / "allowed", "--dtype", "bf16", "--allow-nan")
    convert(source, tmp_path / "moved")  # bytes only: nobody looks at them


def test_values_that_the_dtype_cannot_hold(
    tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path
) -> None:
    source = copied(tiny_model("llama"))
    tensors = load_file(source / "model.safetensors")
    tensors[NORM][0] = 70000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    names = (f"{NORM}: 1 too large for the dtype that is written",)
    refused(1, "hf2megatron", source, tmp_path / "dst", "--dtype", "fp16", names=names)
    convert(source, tmp_path / "bf16", "--dtype", "bf16")


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_of_errors(request: pytest.FixtureRequest) -> None:
    """docs/errors.md holds what the tests of this file and of test_errors.py have seen."""
    modules = {Path(str(item.path)).stem for item in request.session.items}
    if not modules >= set(errors_page.MODULES) or request.session.testsfailed:
        pytest.skip("the page is compared when all tests of bad input have run and passed")
    page = errors_page.render()
    if os.environ.get("SHARDTOOL_WRITE_PAGE"):
        errors_page.PAGE.write_text(page)
    assert errors_page.PAGE.read_text() == page, "docs/errors.md is stale: run scripts/errors-page"
