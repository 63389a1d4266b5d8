"""Requests that make no sense: one clear message, exit 2, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from commands import command, convert
from spoiled import RANK_FILE, Copied, Megatron, Refused, TinyModel, edit, edit_rank


def test_tp_that_does_not_divide(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--tp", 3, names=("tp 3", "divide"))


def test_tp_beyond_the_heads(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--tp", 16, names=("tp 16",))


def test_layers_that_do_not_divide(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    names = ("4 layers", "3 pipeline stages", "--first-stage-layers")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--pp", 3, names=names)


def test_a_dry_run_refuses_the_same(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "plan", "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--tp", 3, names=("divide",))


def test_experts_of_a_dense_model(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--ep", 2, names=("--ep",))


def test_virtual_stages_without_a_pipeline(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--vpp", 2, names=("virtual",))


def test_a_pipeline_layout_that_is_none(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    layout = ("--pp", 2, "--pipeline-layout", "Etx|tL")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", *layout, names=("layout", "x"))


@pytest.mark.parametrize(
    "case",
    [
        "--memory-budget lots", "--memory-budget 1kB", "--memory-budget 0", "--jobs 0", "--jobs two", "--tp 0", "--tp -1",
        "--pp x", "--format zarr", "--spec fused", "--dtype int8", "--vocab-pad ones", "--vocab-divisible-by 0", "--nonsense 1",
    ],
)  # fmt: skip
def test_an_option_that_cannot_be(case: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    option, value = case.split()
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", option, value, names=(option,))


@pytest.mark.parametrize("case", ["", "big", "5XB", "-5GB", "0"])
def test_an_option_that_cannot_be_max_shard_size(
    case: str, megatron: Megatron, refused: Refused, tmp_path: Path
) -> None:
    refused(
        2, "megatron2hf", megatron("llama"), tmp_path / "dst", f"--max-shard-size={case}", names=("--max-shard-size",)
    )


def test_a_missing_argument_and_an_unknown_command(refused: Refused) -> None:
    refused(2, "hf2megatron", names=("SRC",))
    refused(2, "convert", names=("convert",))


def test_an_unknown_level(tiny_model: TinyModel, refused: Refused) -> None:
    model = tiny_model("llama")
    refused(2, "verify", model, model, "--level", "all", names=("accounting, exact, logits",))


RECIPES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "that is no TOML": ("tp = ", ("cannot be read",)),
    "with an entry that is no option": ("tensor_parallel = 2\nvpp = 1\n", ("unknown entries", "tensor_parallel", "tp")),
    "with a word for a number": ('tp = "many"\n', ("--tp",)),
    "with a number out of range": ("tp = 0\n", ("--tp",)),
    "with an unknown format": ('format = "zarr"\n', ("--format", "zarr")),
    "with a table for an option": ("[tp]\nsize = 2\n", ("--tp",)),
    "that is not there": (None, ("cannot be read", "recipe.toml")),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe(case: str, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text, names = RECIPES[case]
    if text is not None:
        recipe.write_text(text)
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--config", recipe, names=names)


def test_dst_exists(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=(tmp_path / "dst", "--overwrite"))


def test_dst_is_a_file(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "dst").write_text("precious")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", "--overwrite", names=("not a directory",))
    assert (tmp_path / "dst").read_text() == "precious"


def test_dst_and_src_inside_each_other(tiny_model: TinyModel, copied: Copied, refused: Refused, tmp_path: Path) -> None:
    source = copied(tiny_model("llama"))
    (tmp_path / "link").symlink_to(source)
    below = tmp_path / "link" / "megatron"
    for dst in (source, source / "megatron", source / "a" / ".." / "megatron", source.parent, below):
        for overwrite in ((), ("--overwrite",)):
            refused(2, "hf2megatron", source, dst, *overwrite, names=("overlap", dst))


def test_dst_that_cannot_be_made(tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "file" / "dst", names=("file/dst",))


def test_src_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    refused(2, "hf2megatron", tmp_path / "nothing", tmp_path / "dst", names=(tmp_path / "nothing",))


@pytest.mark.parametrize("case", ["inspect", "args", "megatron2hf", "reshard"])
def test_a_directory_that_is_no_checkpoint(case: str, refused: Refused, tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "README.md").write_text("nothing here")
    dst = (tmp_path / "dst",) if case in ("megatron2hf", "reshard") else ()
    for source in (empty, other, other / "README.md"):
        refused(1, case, source, *dst, names=(source,))


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, refused: Refused, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(2, "hf2megatron", "nobody/nothing", tmp_path / "dst", names=("nobody/nothing", "give a local directory"))


def test_errors_are_json_on_stdout(tiny_model: TinyModel, copied: Copied, tmp_path: Path) -> None:
    source = edit(copied(tiny_model("llama")), lambda tensors: tensors.pop("model.norm.weight"))
    result = command("hf2megatron", source, tmp_path / "dst", "--json")
    assert result.code == 1
    assert result.json["error"] == "checkpoint"
    assert result.json["details"] == ["missing: model.norm.weight"]
    assert result.json["where"] == str(source)
    assert "error: " in result.err
    result = command("hf2megatron", source, tmp_path / "dst", "--tp", "zero", "--json")
    assert result.code == 2
    assert result.json["error"] == "usage"
    assert "--tp" in result.json["what"]


def test_an_inspection_with_a_problem_is_one_json_document(tiny_model: TinyModel, copied: Copied) -> None:
    source = copied(tiny_model("llama"))
    megatron = convert(source, source.with_name("megatron"), "--format", "torch")
    edit_rank(megatron, lambda content: content["model"].pop("decoder.final_layernorm.weight"))
    result = command("inspect", megatron, "--json")
    assert result.code == 1
    assert result.json["problem"]["details"] == [f"missing: decoder.final_layernorm.weight in mp_rank_00/{RANK_FILE}"]
    assert result.json["format"] == "Megatron torch"
    assert result.err.startswith("error: ")
