"""Megatron's per-rank files: those that megatron-core saved are read, ours load in torch, and gaps are named."""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from filled import DATA, content, load, same, sample, write
from shardtool.errors import CheckpointError
from shardtool.formats.megatron_legacy import (
    Rank,
    find_iteration,
    rank_files,
    rank_name,
    rank_skeleton,
    read_rank,
    read_ranks,
    resolve_rank_fields,
)
from shardtool.formats.tracker import TRACKER, iteration_name, tracker_bytes

torch.serialization.add_safe_globals([Namespace])

SAVED = sorted([*DATA.glob("*/dense/torch"), *DATA.glob("*/tied/torch")])
EMBEDDING, LAYER = "embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize("root", SAVED, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}")
def test_reads_what_megatron_core_saved(root: Path) -> None:
    save = find_iteration(root)
    assert (save.iteration, save.release, save.root, save.directory.name) == (100, False, root, "iter_0000100")
    ranks = read_ranks(save.directory)
    assert list(ranks) == [Rank(tp, pp, 0) for tp in range(2) for pp in range(2)]
    for file in ranks.values():
        theirs = torch.load(file.path, weights_only=True)
        tensors = {k: v for k, v in theirs["model"].items() if not k.endswith("_extra_state")}
        (chunk,) = file.chunks
        assert chunk.keys() == tensors.keys()
        assert all(same(load(chunk[name]), tensor) for name, tensor in tensors.items())
        assert len(file.ignored) == len(theirs["model"]) - len(tensors)
        assert file.iteration == theirs["iteration"] == 100 and file.checkpoint_version == 3.0
        assert file.args == {**vars(theirs["args"]), "params_dtype": "torch.float32"}


def test_there_is_test_data() -> None:
    assert len(SAVED) >= 7


def made(path: Path, root: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(root, path)
    return path


# --- paths -----------------------------------------------------------------------------------------------------------


def test_names_of_ranks() -> None:
    assert rank_name(1, 0, 0, 1, 1) == "mp_rank_01"
    assert rank_name(1, 2, 0, 3, 1) == "mp_rank_01_002"
    assert rank_name(1, 0, 2, 1, 3) == "mp_rank_01_002"
    assert rank_name(11, 2, 3, 3, 4) == "mp_rank_11_002_003"
    assert rank_name(128, 2, 3, 3, 4) == "mp_rank_128_002_003"


def test_find_iteration(tmp_path: Path) -> None:
    for name in ("iter_0000007", "release"):
        made(tmp_path / name / "mp_rank_00" / "model_optim_rng.pt", {})
    (tmp_path / TRACKER).write_bytes(b"7\n")
    assert find_iteration(tmp_path).directory == tmp_path / iteration_name(7)
    (tmp_path / TRACKER).write_bytes(tracker_bytes(None))
    save = find_iteration(tmp_path)
    assert (save.directory, save.iteration, save.release) == (tmp_path / "release", None, True)
    save = find_iteration(tmp_path / "iter_0000007")
    assert (save.iteration, save.release, save.root) == (7, False, None)
    assert find_iteration(tmp_path / "release").release
    (tmp_path / "release").rename(tmp_path / "copy")
    assert find_iteration(tmp_path / "copy").iteration is None
    with pytest.raises(CheckpointError, match=r"missing\n.*\n  expected: release\n.*\nhint: name the save itself"):
        find_iteration(tmp_path)
    for text in (b"", b"-3", b"latest", b"\xff\xfe", b"9" * 60, b"../evil"):
        (tmp_path / TRACKER).write_bytes(text)
        with pytest.raises(CheckpointError, match="tracker file"):
            find_iteration(tmp_path)
    (tmp_path / TRACKER).unlink()
    with pytest.raises(CheckpointError, match=r"hint: name one of them: .*iter_0000007"):
        find_iteration(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        find_iteration(tmp_path / "absent")


def test_rank_files(tmp_path: Path) -> None:
    for name in ("mp_rank_00_000", "mp_rank_00_001", "mp_rank_128_001"):
        made(tmp_path / name / "model_optim_rng.pt", {})
    (tmp_path / "notes").mkdir()
    assert [fields for _, fields in rank_files(tmp_path)] == [(0, 0), (0, 1), (128, 1)]
    (tmp_path / "mp_rank_01_000").mkdir()
    with pytest.raises(CheckpointError, match="a rank has no file"):
        rank_files(tmp_path)
    made(tmp_path / "mp_rank_01_000" / "model_optim_rng.pt", {}).parent.rename(tmp_path / "mp_rank_01")
    with pytest.raises(CheckpointError, match="no set of Megatron ranks"):
        rank_files(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="found: none"):
        rank_files(tmp_path / "empty")


# --- which rank is it ------------------------------------------------------------------------------------------------


def two_files(root: Path, args: dict[str, Any] | None, first: list[str], second: list[str]) -> Path:
    for index, names in enumerate((first, second)):
        state: dict[str, Any] = {"model": {name: torch.ones(1) for name in names}}
        if args is not None:
            state["args"] = Namespace(**args)
        made(root / f"mp_rank_00_{index:03d}" / "model_optim_rng.pt", state)
    return root


PIPELINE = [Rank(0, 0, 0), Rank(0, 1, 0)]
EXPERT = [Rank(0, 0, 0), Rank(0, 0, 1)]


@pytest.mark.parametrize(
    ("args", "second", "expected"),
    [
        ({"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 1}, [LAYER], PIPELINE),
        ({"pipeline_model_parallel_size": 1, "expert_model_parallel_size": 2}, [EMBEDDING, LAYER], EXPERT),
        ({"pipeline_model_parallel_size": 2}, [LAYER], PIPELINE),
        ({"pipeline_model_parallel_size": 1}, [EMBEDDING, LAYER], EXPERT),
        (None, [LAYER], PIPELINE),
        (None, [EMBEDDING, LAYER], EXPERT),
        ({}, [LAYER], PIPELINE),
    ],
)
def test_the_second_number_is_pipeline_or_expert(
    tmp_path: Path, args: dict[str, Any] | None, second: list[str], expected: list[Rank]
) -> None:
    assert list(read_ranks(two_files(tmp_path, args, [EMBEDDING, LAYER], second))) == expected


def test_both_sizes_need_three_numbers(tmp_path: Path) -> None:
    args = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    with pytest.raises(CheckpointError, match="lacks a number"):
        read_ranks(two_files(tmp_path, args, [EMBEDDING], [LAYER]))


def test_one_and_three_numbers(tmp_path: Path) -> None:
    file = read_rank(made(tmp_path / "x.pt", {"model": {}}))
    assert resolve_rank_fields({(3,): file}) == {(3,): Rank(3, 0, 0)}
    assert resolve_rank_fields({(3, 2, 1): file}) == {(3, 2, 1): Rank(3, 2, 1)}


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    shutil.copytree(DATA / "0.16.1" / "dense" / "torch", tmp_path / "c")
    save = tmp_path / "c" / "iter_0000100"
    shutil.rmtree(save / "mp_rank_01_001")
    with pytest.raises(CheckpointError, match=r"tp 2 x pp 2 x ep 1\n  found: no file for tp 1 pp 1"):
        read_ranks(save)
    shutil.rmtree(save / "mp_rank_01_000")
    with pytest.raises(CheckpointError, match="no file for tp 1 pp 0, tp 1 pp 1"):
        read_ranks(save)


def test_expert_tensor_parallel_size_1_leaves_gaps_in_tp_x_ep(tmp_path: Path) -> None:
    # tp 2, ep 4, etp 1: only the pairs that occur on a rank
    args = Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1, expert_model_parallel_size=4)
    for tp, ep in ((0, 0), (1, 1), (0, 2), (1, 3)):
        made(tmp_path / rank_name(tp, 0, ep, 1, 4) / "model_optim_rng.pt", {"args": args, "model": {}})
    assert sorted(read_ranks(tmp_path)) == [Rank(0, 0, 0), Rank(0, 0, 2), Rank(1, 0, 1), Rank(1, 0, 3)]


# --- what a file holds -----------------------------------------------------------------------------------------------


def test_extra_states_and_parameters(tmp_path: Path) -> None:
    model = OrderedDict(
        {
            "a.weight": torch.nn.Parameter(torch.ones(2, 3)),
            "a._extra_state": None,
            "b._extra_state": torch.empty(0, dtype=torch.uint8),
            "c._extra_state": io.BytesIO(b"state"),
            "d._extra_state": torch.tensor([1, 2], dtype=torch.uint8),
            "e.bias": None,
        }
    )
    model._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    root = {"model": model, "optimizer": {"state": {0: torch.ones(1)}}, "rng_state": [{}], "total_iters": 5}
    file = read_rank(made(tmp_path / "x.pt", root))
    assert list(file.chunks[0]) == ["a.weight"] and same(load(file.chunks[0]["a.weight"]), torch.ones(2, 3))
    assert file.ignored == [f"model: {name}" for name in list(model)[1:]]
    assert file.other_keys == ["optimizer", "rng_state", "total_iters"]
    assert (file.args, file.iteration, file.checkpoint_version) == (None, 5, None)


def test_weights_that_are_no_tensors(tmp_path: Path) -> None:
    for value in (3, "text", [torch.ones(1)], {"weight": torch.ones(1)}):
        path = made(tmp_path / "x.pt", {"model": {"a.weight": value}})
        with pytest.raises(CheckpointError, match=r"no plain tensor\n  where: .*x\.pt: model: a\.weight"):
            read_rank(path)


def test_a_tensor_subclass_is_no_plain_tensor(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "x.pt"
    pickled = b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00actransformer_engine.pytorch.x\nFloat8Tensor\n)Rss."
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
    with pytest.raises(CheckpointError, match=r"(?s)transformer_engine\.pytorch\.x\.Float8Tensor.*fp8-param-gather"):
        read_rank(path)


def test_models_from_before_megatron_core(tmp_path: Path) -> None:
    old = {"model": {"language_model": {"embedding": {"word_embeddings": {"weight": torch.ones(1)}}}}}
    with pytest.raises(CheckpointError, match="before megatron-core"):
        read_rank(made(tmp_path / "x.pt", old))


@pytest.mark.parametrize("root", [{}, {"args": 1}, {"model0": {}, "model2": {}}, {"model": {}, "model0": {}}, [1]])
def test_files_without_a_whole_model(tmp_path: Path, root: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no whole Megatron model|no Megatron checkpoint"):
        read_rank(made(tmp_path / "x.pt", root))


def test_the_model_must_be_a_state_dict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no state dict"):
        read_rank(made(tmp_path / "x.pt", {"model": [1]}))


def test_a_pickle_that_runs_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch canary",)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)x\.pt.*posix\.system"):
        read_rank(made(tmp_path / "x.pt", {"args": Evil(), "model": {}}))
    assert not (tmp_path / "canary").exists()


# --- what we write ---------------------------------------------------------------------------------------------------

ARGS = {
    "num_layers": 4, "params_dtype": "torch.bfloat16", "normalization": "RMSNorm", "norm_epsilon": 1e-6, "spec": None,
    "moe_layer_freq": [0, 1], "tokenizer_model": "torch.txt",
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
def test_torch_loads_what_we_write(tmp_path: Path, count: int) -> None:
    shapes = {EMBEDDING: (8, 4), LAYER: (6, 4), "decoder.final_layernorm.weight": (4,)}
    chunks = [[(name, shape, "bfloat16") for name, shape in shapes.items()] for _ in range(count)]
    extra = [["decoder.layers.0.mlp.linear_fc1._extra_state"]] * count
    skeleton = rank_skeleton(ARGS, chunks, 7, extra)
    assert set(skeleton.payload) == {(index, name) for index in range(count) for name in shapes}
    path = write(skeleton, tmp_path / "x.pt", lambda key: content(sample(shapes[key[1]], "bfloat16")))  # type: ignore[index]
    loaded = torch.load(path, weights_only=True)
    keys = ["model"] if count == 1 else [f"model{index}" for index in range(count)]
    assert list(loaded) == ["args", "checkpoint_version", "iteration", *keys, "num_floating_point_operations_so_far"]
    assert vars(loaded["args"]) == {**ARGS, "params_dtype": torch.bfloat16}
    assert (loaded["checkpoint_version"], loaded["iteration"]) == (3.0, 7)
    for key in keys:
        assert isinstance(loaded[key], OrderedDict)
        assert loaded[key].pop("decoder.layers.0.mlp.linear_fc1._extra_state") is None
        assert all(same(tensor, sample(shapes[name], "bfloat16")) for name, tensor in loaded[key].items())
    file = read_rank(path)
    assert file.args == ARGS and file.iteration == 7 and len(file.ignored) == count
    assert [list(chunk) for chunk in file.chunks] == [list(shapes)] * count


def test_real_modules_load_what_we_write(tmp_path: Path) -> None:
    layers = pytest.importorskip("megatron.core.tensor_parallel.layers")
    safe = pytest.importorskip("megatron.core.safe_globals")
    safe.register_safe_globals()
    skeleton = rank_skeleton(ARGS, [[("weight", (4, 3), "float32")]], 0, [["_extra_state"]])
    path = write(skeleton, tmp_path / "x.pt", lambda _: content(sample((4, 3), "float32")))
    state = torch.load(path)["model"]
    module = layers.ColumnParallelLinear.__new__(layers.ColumnParallelLinear)
    torch.nn.Module.__init__(module)
    module.weight = torch.nn.Parameter(torch.empty(4, 3))
    module.load_state_dict(state, strict=True)
    assert same(module.weight.detach(), sample((4, 3), "float32"))
