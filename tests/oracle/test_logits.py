"""The judge: right checkpoints pass, in every layout; each planted fault is caught, and named.

The checkpoints are made by tests/oracle/handwritten.py or by megatron-core itself (tests/data/megatron-core), never by
shardtool. What passes here differs by rounding only: a ratio of 1e-5 is asked for, a tenth of verify's threshold.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from handwritten import CONFIGS, VOCAB, edit, write
from shardtool import tiny
from shardtool.errors import CheckpointError, UsageError
from shardtool.families.architecture import Architecture, Rope, RopeScaling
from shardtool.layout.mesh import Mesh
from shardtool.verify import (
    HuggingFaceSide,
    Level,
    Limits,
    MegatronSide,
    PromptSet,
    VerifyReport,
    compare_logits,
    get_pool,
    make_prompts,
    run_side,
)

EXACT = 1e-5

DATA = Path(os.environ.get("SHARDTOOL_TEST_DATA", Path(__file__).parents[1] / "data")) / "megatron-core"

LLAMA = Architecture("llama", 4, 64, 8, 2, 8, 96, VOCAB, 256)
GPT2 = Architecture(
    "gpt2", 4, 64, 8, 8, 8, 256, VOCAB, 64, norm="layer", activation="gelu_tanh", gated=False,
    qkv_bias=True, linear_bias=True, tied=True, rope=None,
)  # fmt: skip
ARCHITECTURES = {
    "llama": LLAMA,
    "llama3": replace(LLAMA, rope=Rope(5e5, scaling=RopeScaling("llama3", 8.0))),
    "linear": replace(LLAMA, norm_eps=1e-6, rope=Rope(scaling=RopeScaling("linear", 4.0))),
    "mistral": replace(LLAMA, norm_eps=1e-6, head_dim=16, window=8),
    "qwen2": replace(LLAMA, norm_eps=1e-6, qkv_bias=True, tied=True, rope=Rope(1e6)),
    "qwen3": replace(LLAMA, norm_eps=1e-6, qk_norm=True, head_dim=16, rope=Rope(1e6)),
    "stablelm": replace(LLAMA, norm="layer", rope=Rope(fraction=0.5)),
    "gpt2": GPT2,
    "gpt2_erf": replace(GPT2, activation="gelu"),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("hf")

    def get(name: str) -> Path:
        if not (root / name).exists():
            tiny.build(CONFIGS[name], root / name)
        return root / name

    return get


@pytest.fixture
def pair(model: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[HuggingFaceSide, MegatronSide]]:
    """A model on both sides, the Megatron one written by hand."""

    def get(name: str, mesh: Mesh | None = None, **options: bool) -> tuple[HuggingFaceSide, MegatronSide]:
        mesh, arch = mesh or Mesh(), ARCHITECTURES[name]
        out = write(model(name), tmp_path / f"megatron{len(list(tmp_path.iterdir()))}", arch, mesh, **options)
        return HuggingFaceSide(model(name)), MegatronSide(out, arch, mesh)

    return get


Pair = Callable[..., tuple[HuggingFaceSide, MegatronSide]]


# --- right checkpoints pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", Mesh()),
        ("llama", Mesh(tp=2, pp=2)),
        ("llama", Mesh(pp=2, vpp=2)),
        ("llama", Mesh(pp=2, first_stage_layers=1)),
        ("llama", Mesh(tp=2, pp=2, pipeline_layout="Et|tttL")),
        ("llama3", Mesh(tp=2)),
        ("linear", Mesh(tp=2)),
        ("mistral", Mesh(tp=2, pp=2)),
        ("qwen2", Mesh()),
        ("qwen2", Mesh(tp=2, pp=2)),
        ("qwen2", Mesh(tp=4)),  # 2 query groups over 4 ranks
        ("qwen3", Mesh(tp=2)),
        ("stablelm", Mesh(tp=2)),
        ("gpt2", Mesh(tp=2, pp=2)),
        ("gpt2", Mesh(tp=4)),
        ("gpt2_erf", Mesh()),
    ],
    ids=lambda value: value if isinstance(value, str) else f"tp{value.tp}pp{value.pp}vpp{value.vpp}",
)
def test_a_right_checkpoint_passes(pair: Pair, name: str, mesh: Mesh) -> None:
    report = compare_logits(*pair(name, mesh))
    assert report.passed, report.lines()
    assert report.exit_code == 0
    print(f"{name} tp{mesh.tp} pp{mesh.pp}: {report.ratio:.1e}, {report.seconds}")
    assert report.ratio < EXACT
    assert report.first_diverging is None
    assert max(report.measured.layers) < EXACT
    assert len(report.measured.layers) == 5
    assert report.measured.top1 == 1
    assert report.measured.vocab_size == VOCAB


def test_transformer_engine_names_pass(pair: Pair) -> None:
    assert compare_logits(*pair("gpt2", Mesh(tp=2, pp=2), te=True)).ratio < EXACT
    assert compare_logits(*pair("qwen3", Mesh(tp=2), te=True)).ratio < EXACT


def test_two_sides_of_one_kind(pair: Pair, model: Callable[[str], Path]) -> None:
    hf, one = pair("llama")
    _, two = pair("llama", Mesh(tp=2, pp=2))
    assert compare_logits(one, two).ratio < EXACT
    assert compare_logits(hf, hf).ratio == 0
    other = compare_logits(hf, HuggingFaceSide(model("llama3")))
    assert not other.passed
    assert other.first_diverging == "layer 0"


def test_half_precision_is_judged_by_its_own_noise(pair: Pair) -> None:
    hf, megatron = pair("qwen2", Mesh(tp=2))
    right = compare_logits(hf, megatron, dtype="bf16")
    assert right.passed, right.lines()
    assert 1e-3 < right.threshold < 0.5
    print(f"bf16 ratio {right.ratio:.1e}, threshold {right.threshold:.1e}")
    wrong = replace(megatron, architecture=replace(megatron.architecture, rope=Rope(1e4)))
    assert not compare_logits(hf, wrong, dtype="bf16").passed
    assert compare_logits(hf, megatron, dtype="native").dtype == "fp32"
    assert compare_logits(megatron, megatron, dtype="native").dtype == "fp32"


KINDS = sorted(
    path.parent.relative_to(DATA).parts
    for kind in ("dense", "tied")
    for path in DATA.glob(f"*/{kind}/*/latest_checkpointed_iteration.txt")
)
SAVED = Architecture("", 4, 32, 4, 2, 8, 48, VOCAB, 64, norm_eps=1e-6, rope=Rope(5e5))


def saved(version: str, kind: str, layout: str, mesh: Mesh) -> MegatronSide:
    return MegatronSide(
        DATA / version / kind / layout, replace(SAVED, tied=kind == "tied", qkv_bias=kind == "tied"), mesh
    )


def test_the_saved_checkpoints_are_there() -> None:
    assert {"0.14.0", "0.15.3", "0.16.1", "0.19.2", "0.19.2-te"} <= {version for version, _, _ in KINDS}
    assert {"torch", "torch_dist"} == {layout for _, _, layout in KINDS}


@pytest.mark.parametrize(("version", "kind", "layout"), KINDS)
def test_what_megatron_core_saved_gives_its_logits(version: str, kind: str, layout: str) -> None:
    side = saved(version, kind, layout, Mesh(tp=2, pp=2))
    expected = torch.load(side.path.parent / "logits.pt")
    before = {path: path.stat().st_mtime_ns for path in side.path.rglob("*")}
    prompts = PromptSet(tuple(tuple(row) for row in expected["ids"].tolist()))
    logits = run_side(side, prompts).logits
    reference = expected["logits"].flatten(0, 1)
    assert float((logits - reference).abs().max() / reference.std()) <= EXACT
    assert {path: path.stat().st_mtime_ns for path in side.path.rglob("*")} == before


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2, pp=2, vpp=2), Mesh(pp=4)], ids=["tp1", "vpp2", "pp4"])
def test_torch_dist_loads_at_another_layout(mesh: Mesh) -> None:
    legacy = saved("0.16.1", "tied", "torch", Mesh(tp=2, pp=2))
    assert compare_logits(legacy, saved("0.16.1", "tied", "torch_dist", mesh)).ratio < EXACT
    # without common.pt; the same weights
    assert compare_logits(legacy, saved("0.19.2", "tied", "torch_dist", mesh)).ratio < EXACT


# --- planted faults --------------------------------------------------------------------------------------------------


def rank_file(side: MegatronSide, rank: str = "mp_rank_00") -> Path:
    return side.path / "release" / rank / "model_optim_rng.pt"


def ungrouped(state: dict[str, torch.Tensor]) -> None:
    """All queries, all keys, all values instead of group by group: right for a model with one group only."""
    for key, value in state.items():
        if key.endswith("linear_qkv.weight"):
            groups = value.reshape(2, 6, 8, 64)  # group, 4 queries + key + value, head dim, hidden
            parts = (groups[:, :4], groups[:, 4:5], groups[:, 5:])
            state[key] = torch.cat([part.reshape(-1, 64) for part in parts])


def swapped_halves(state: dict[str, torch.Tensor]) -> None:
    for key, value in state.items():
        if key.endswith("linear_fc1.weight"):
            state[key] = torch.cat(list(reversed(value.chunk(2))))


def one_row(state: dict[str, torch.Tensor]) -> None:
    state["decoder.layers.2.mlp.linear_fc2.weight"][5] += 0.05


@pytest.mark.parametrize(
    ("change", "diverging"), [(ungrouped, "layer 0"), (swapped_halves, "layer 0"), (one_row, "layer 2")]
)
def test_a_wrong_tensor_is_rejected(
    pair: Pair, change: Callable[[dict[str, torch.Tensor]], None], diverging: str
) -> None:
    hf, megatron = pair("llama")
    edit(rank_file(megatron), change)
    report = compare_logits(hf, megatron)
    assert (report.exit_code, report.first_diverging) == (1, diverging), report.lines()
    assert not report.problems
    assert report.ratio > 100 * report.threshold


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"norm_eps": 1e-2}),
        ("llama", {"rope": Rope(10500.0)}),
        ("llama3", {"rope": Rope(5e5)}),
        ("linear", {"rope": Rope()}),
        ("mistral", {"window": 9}),
        ("mistral", {"window": None}),
        ("gpt2", {"activation": "gelu"}),
        ("stablelm", {"rope": Rope()}),
        ("stablelm", {"rope": Rope(fraction=0.5, interleaved=True)}),
    ],
)
def test_a_wrong_argument_is_rejected(pair: Pair, name: str, change: dict[str, object]) -> None:
    hf, megatron = pair(name)
    report = compare_logits(hf, replace(megatron, architecture=replace(megatron.architecture, **change)))  # type: ignore[arg-type]
    print(f"{name} {change}: {report.ratio:.1e}")
    assert report.exit_code == 1
    assert not report.problems


def test_a_wrong_copy_of_the_tied_embedding_is_rejected(pair: Pair) -> None:
    hf, megatron = pair("qwen2", Mesh(pp=2))
    edit(rank_file(megatron, "mp_rank_00_001"), lambda state: state["output_layer.weight"].mul_(1.01))
    report = compare_logits(hf, megatron)
    assert (report.exit_code, report.first_diverging) == (1, "output layer")


def test_a_missing_tensor_is_reported(pair: Pair) -> None:
    hf, megatron = pair("qwen3", Mesh(tp=2))
    for rank in ("mp_rank_00", "mp_rank_01"):
        edit(rank_file(megatron, rank), lambda state: state.pop("decoder.layers.1.pre_mlp_layernorm.weight"))
    report = compare_logits(hf, megatron)
    assert report.exit_code == 1
    assert "missing: decoder.layers.*.pre_mlp_layernorm.weight" in report.problems[0]
    assert report.measured.positions == 0


def test_a_fault_of_one_rank_ends_the_job_on_all(pair: Pair) -> None:
    hf, megatron = pair("qwen3", Mesh(tp=2))
    edit(rank_file(megatron, "mp_rank_01"), lambda state: state.update(stray=torch.zeros(1)))
    assert "unexpected: stray" in compare_logits(hf, megatron).problems[0]
    pool = get_pool(2)
    rank_file(megatron, "mp_rank_01").unlink()
    report = compare_logits(hf, megatron)
    assert report.exit_code == 1
    assert "does not exist" in report.problems[0]
    assert get_pool(2) is pool  # and the workers go on


def test_a_wrong_shape_a_damaged_file_and_nan_are_reported(pair: Pair) -> None:
    hf, megatron = pair("llama")
    path = rank_file(megatron)
    edit(path, lambda state: state.update({"decoder.final_layernorm.weight": torch.ones(65)}))
    assert "decoder.final_layernorm.weight" in compare_logits(hf, megatron).problems[0]
    edit(path, lambda state: state.update({"decoder.final_layernorm.weight": torch.full((64,), torch.nan)}))
    report = compare_logits(hf, megatron)
    assert report.exit_code == 1
    assert "NaN" in report.problems[0]
    assert report.as_dict()["ratio"] is None
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read" in compare_logits(hf, megatron).problems[0]


def test_nothing_compared_is_no_pass(pair: Pair) -> None:
    hf, megatron = pair("llama")
    assert compare_logits(hf, megatron, prompts=PromptSet(())).exit_code == 1
    edit(rank_file(megatron), lambda state: state["output_layer.weight"].zero_())
    report = compare_logits(megatron, megatron)
    assert report.exit_code == 1
    assert "nothing was compared" in report.problems[0]


def test_a_hugging_face_directory_must_be_complete(model: Callable[[str], Path], tmp_path: Path) -> None:
    broken = shutil.copytree(model("llama"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file({**tensors, "stray": torch.ones(1)}, broken / "model.safetensors", metadata={"format": "pt"})
    report = compare_logits(HuggingFaceSide(model("llama")), HuggingFaceSide(broken))
    assert report.exit_code == 1
    assert "missing: model.layers.3.mlp.up_proj.weight" in report.problems[0]
    assert "unexpected: stray" in report.problems[0]


def test_a_torch_dist_checkpoint_without_a_shard_is_reported(tmp_path: Path) -> None:
    good = saved("0.16.1", "dense", "torch_dist", Mesh(tp=2))
    broken = replace(good, path=shutil.copytree(good.path, tmp_path / "broken"))
    next((broken.path / "iter_0000100").glob("__1_*.distcp")).unlink()
    report = compare_logits(good, broken)
    assert report.exit_code == 1
    assert "megatron-core cannot load the checkpoint" in report.problems[0]
    other = replace(good, architecture=replace(good.architecture, qkv_bias=True))  # asks for what is not there
    assert "linear_qkv.bias" in compare_logits(good, other).problems[0]


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_code_in_the_index_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "release"
    directory.mkdir()
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (directory / ".metadata").write_bytes(pickle.dumps(_Payload()))
    report = compare_logits(MegatronSide(directory, SAVED, Mesh()), MegatronSide(directory, SAVED, Mesh()))
    assert "names code" in report.problems[0]
    assert "system" in report.problems[0]


def test_what_megatron_core_cannot_express_is_a_wrong_request(pair: Pair) -> None:
    hf, megatron = pair("llama3")
    scaling = RopeScaling("llama3", 8.0, high_freq_factor=2.0)
    with pytest.raises(UsageError, match="rope scaling"):
        compare_logits(hf, replace(megatron, architecture=replace(LLAMA, rope=Rope(5e5, scaling=scaling))))
    with pytest.raises(UsageError):
        compare_logits(hf, replace(megatron, mesh=Mesh(pp=3)))


def test_a_dead_worker_is_an_error_not_a_hang(pair: Pair) -> None:
    hf, megatron = pair("llama")
    pool = get_pool(1)
    pool._processes[0].kill()
    report = compare_logits(hf, megatron)
    assert report.exit_code == 1
    assert "died" in report.problems[0]
    assert "SIGKILL" in report.problems[0]
    assert get_pool(1) is not pool
    with pytest.raises(CheckpointError, match="did not answer in time"):
        run_side(megatron, PromptSet(((1, 2, 3),)), timeout=0.01)
    assert run_side(megatron, PromptSet(((1, 2, 3),))).logits.shape == (3, VOCAB)


def test_importing_verify_is_light() -> None:
    code = "import sys, shardtool.verify; print({'torch', 'transformers', 'megatron'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- prompts and the report ------------------------------------------------------------------------------------------


def test_prompts_reach_beyond_the_limits_that_fit() -> None:
    made = make_prompts(Limits(1000, 4096, window=40, original_max_positions=2048), max_tokens=256, lengths=(1, 7, 33))
    assert sorted(map(len, made.prompts)) == [1, 7, 33, 48]
    assert made.coverage[0] == "89 of 1000 embedding rows"
    assert made.coverage[1].startswith("covers the attention window")
    assert made.coverage[2].startswith("does not cover the unscaled rope positions")
    assert make_prompts(Limits(1000, 4096)) == make_prompts(Limits(1000, 4096))
    assert make_prompts(Limits(1000, 4096), seed=1) != make_prompts(Limits(1000, 4096))
    assert max(map(len, make_prompts(Limits(10, 5)).prompts)) == 5
    with pytest.raises(UsageError):
        make_prompts(Limits(1000, 4096), max_tokens=0)


def test_the_report_says_what_was_asked_and_answered(pair: Pair) -> None:
    hf, megatron = pair("llama")
    level = compare_logits(hf, megatron).level()
    report = VerifyReport("x", "y", (Level("exact", None), level))
    assert report.exit_code == 0
    assert json.loads(json.dumps(report.as_dict()))["levels"][1]["threshold"] == 1e-4
    assert report.lines()[-1] == "the same model"
    assert any("do both models compute the same function? yes" in line for line in report.lines())
    assert VerifyReport("x", "y", (Level("exact", False), level)).exit_code == 1
    nothing = VerifyReport("x", "y", (Level("exact", None),))
    assert (nothing.exit_code, nothing.lines()[-1]) == (1, "nothing was compared")
