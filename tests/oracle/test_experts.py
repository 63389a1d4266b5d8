"""Experts, latent attention and multi-token prediction: real megatron-core is the judge, in every parallel layout.

Logits through `verify` for each family; a grid of layouts that must round trip, and reshard into each other, bit for
bit; checkpoints that megatron-core itself saved; and planted faults, each of which `verify` must reject by its logits.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import asdict, replace
from safetensors.torch import load_file

from builds import with_multi_token_prediction
from commands import command, done
from faults import contents, edit_args, edit_tensors
from shardtool import tiny
from shardtool.checkpoint.megatron import read_megatron
from shardtool.layout.mesh import Mesh, chunks, virtual_stages
from shardtool.manifest import MANIFEST
from shardtool.verify import MegatronSide, PromptSet, get_pool, run_side
from shardtool.verify.huggingface import load

EXACT = 1e-5
CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
DATA = Path(os.environ.get("SHARDTOOL_TEST_DATA", Path(__file__).parents[1] / "data")) / "megatron-core"

TinyModel = Callable[[str], Path]
State = dict[str, torch.Tensor]
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Form:
    """How a checkpoint is written: format and spelling."""

    format: str = "torch"
    spec: str = "te"
    experts: str = "grouped"

    @property
    def options(self) -> list[str]:
        return ["--format", self.format, "--spec", self.spec, "--experts", self.experts]


TE, LOCAL, DIST = Form(), Form(spec="local", experts="sequential"), Form("torch_dist")
FORMS = {"te": TE, "local": LOCAL, "dist": DIST}


def mesh_options(mesh: Mesh) -> list[str]:
    """The command line of a mesh."""
    found: list[str] = []
    for name, value in asdict(mesh).items():
        if value != getattr(Mesh(), name):
            flag = "--" + name.replace("_", "-")
            found += [flag] if value is True else [flag, str(value)]
    return found


def name_of(value: object) -> str | None:
    """Short names of parameters."""
    if isinstance(value, Mesh):
        return "".join(mesh_options(value)).replace("--", "-").strip("-") or "one"
    return next((name for name, form in FORMS.items() if form == value), None)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model directory in a layout and form, converted once. Do not change it."""
    root = tmp_path_factory.mktemp("converted")
    made: dict[object, Path] = {}

    def get(model: Path, mesh: Mesh, form: Form = TE) -> Path:
        key = (model, mesh, form)
        if key not in made:
            made[key] = root / str(len(made))
            done("hf2megatron", model, made[key], "-q", *mesh_options(mesh), *form.options)
        return made[key]

    return get


Converted = Callable[..., Path]


# --- the logits of each family ---------------------------------------------------------------------------------------

FAMILIES = (
    "mixtral", "qwen2_moe", "qwen2_moe_mixed", "qwen3_moe", "glm4_moe", "dots1", "deepseek_v3", "moonlight",
)  # fmt: skip
LAYOUTS = [
    (TE, Mesh(tp=2, pp=2, vpp=2, ep=2)),
    (TE, Mesh(tp=2, ep=4, etp=1)),
    (LOCAL, Mesh(tp=2, pp=2)),
    (DIST, Mesh(tp=2, pp=2, ep=2)),
]


def ratio(model: Path, checkpoint: Path, record: Record) -> float:
    """The distance that `verify` measures with all its levels, which must pass."""
    report = done("verify", model, checkpoint, "--json", "-q").json
    assert [level["passed"] for level in report["levels"]] == [True] * 3, report
    logits = report["levels"][-1]
    record("ratio", logits["ratio"])
    return logits["ratio"]


@pytest.mark.parametrize(("form", "mesh"), LAYOUTS, ids=name_of)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_family_is_the_same_model(
    name: str, form: Form, mesh: Mesh, tiny_model: TinyModel, converted: Converted, record_property: Record
) -> None:
    model = tiny_model(name)
    assert ratio(model, converted(model, mesh, form), record_property) < EXACT


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_more_expert_than_dense_shards(
    name: str, tiny_model: TinyModel, converted: Converted, record_property: Record
) -> None:
    """Only torch_dist can hold them."""
    model = tiny_model(name)
    assert ratio(model, converted(model, Mesh(ep=2, etp=2), DIST), record_property) < EXACT


@pytest.mark.parametrize("form", [TE, DIST], ids=name_of)
@pytest.mark.parametrize("tp", [4, 8])
def test_more_tensor_parallel_ranks_than_query_groups(
    tp: int, form: Form, tiny_model: TinyModel, converted: Converted, tmp_path: Path, record_property: Record
) -> None:
    model = tiny_model("qwen2_moe")
    assert json.loads((model / "config.json").read_text())["num_key_value_heads"] == 2
    checkpoint = converted(model, Mesh(tp=tp), form)
    assert ratio(model, checkpoint, record_property) < EXACT
    done("megatron2hf", checkpoint, tmp_path / "back", "-q")
    assert tiny.differences(model, tmp_path / "back")[1] == []
    if tp == 8 and form == DIST:
        get_pool(tp).close()


def test_a_worker_that_changes_its_groups_keeps_no_old_ones(tiny_model: TinyModel, converted: Converted) -> None:
    """Each set of groups has a few dozen threads, which would go on polling."""
    model, prompts = tiny_model("mixtral"), PromptSet(((1, 2, 3),))
    sides = []
    for mesh in (Mesh(tp=2), Mesh(tp=2, ep=2, etp=1)):
        opened = read_megatron(converted(model, mesh))
        sides.append(MegatronSide(opened.path, opened.architecture, opened.mesh))
    counts = []
    for _ in range(3):
        for side in sides:
            run_side(side, prompts)
        status = Path(f"/proc/{get_pool(2)._processes[0].pid}/status").read_text()
        counts.append(int(status.split("Threads:")[1].split()[0]))
    assert counts[-1] - counts[0] <= 8 * (len(counts) - 1), counts  # it was 48 a round


def test_expert_shards_that_no_tensor_parallel_group_has(
    tiny_model: TinyModel, converted: Converted, record_property: Record
) -> None:
    """etp 3 does not divide tp 4: the experts are put together and cut anew."""
    model = tiny_model("mixtral")
    assert ratio(model, converted(model, Mesh(tp=4, ep=4, etp=3)), record_property) < EXACT


# --- the grid --------------------------------------------------------------------------------------------------------

GRID_LAYERS = 6
GRID_MODELS = ("mixtral", "qwen3_moe", "deepseek_v3")  # the last with a multi-token-prediction layer
GRID = [
    Mesh(),
    Mesh(tp=2),
    Mesh(tp=4),
    Mesh(tp=8),
    Mesh(pp=2),
    Mesh(pp=3),
    Mesh(pp=6),
    Mesh(pp=3, vpp=2),
    Mesh(pp=2, vpp=3),
    Mesh(ep=2),
    Mesh(ep=4),
    Mesh(ep=8),
    Mesh(tp=2, pp=2),
    Mesh(tp=2, ep=2),
    Mesh(tp=2, pp=3, ep=2),
    Mesh(tp=2, pp=3, vpp=2, ep=4),
    Mesh(tp=4, pp=2, vpp=3, ep=2),
    Mesh(tp=2, etp=1),
    Mesh(tp=2, ep=2, etp=1),
    Mesh(tp=2, ep=4, etp=1),
    Mesh(tp=4, ep=4, etp=2),
    Mesh(tp=4, pp=2, ep=2, etp=2),
    Mesh(tp=4, pp=3, ep=4, etp=1),
    Mesh(pp=2, first_stage_layers=1),
    Mesh(tp=2, pp=3, ep=2, last_stage_layers=4),
    Mesh(pp=4, first_stage_layers=1, last_stage_layers=1),
    Mesh(pp=2, vpp=2, first_stage_layers=2),
    Mesh(tp=2, pp=3, vpp=2, ep=2, etp=1, last_stage_layers=2),
    Mesh(pp=4, account_for_embedding=True, account_for_loss=True),
    Mesh(tp=2, pp=2, vpp=2, ep=2, account_for_embedding=True, account_for_loss=True),
    Mesh(pp=2, vpp=2, pipeline_layout="Et|tt|tt|tmL"),
    Mesh(tp=2, pp=4, ep=2, pipeline_layout="E|t*3|t*3|mL"),  # stages without layers
    Mesh(pp=3, pipeline_layout="Et*5|tm|L"),  # multi-token prediction and loss apart
]


@pytest.fixture(scope="module")
def grid_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The models of the grid: as their tiny configs, with 6 layers."""
    root = tmp_path_factory.mktemp("grid")

    def get(name: str) -> Path:
        if not (root / name).exists():
            config = json.loads((CONFIGS / f"{name}.json").read_text()) | {"num_hidden_layers": GRID_LAYERS}
            tiny.build(config, root / name)
            if name == "deepseek_v3":
                with_multi_token_prediction(root / name)
        return root / name

    return get


@pytest.mark.parametrize(("form", "mesh"), [(TE, Mesh(tp=2, pp=2, ep=2)), (DIST, Mesh(tp=2, ep=2))], ids=name_of)
def test_glms_multi_token_prediction_goes_there_and_back(form: Form, mesh: Mesh, tmp_path: Path) -> None:
    """With the copies of embedding and head that its files repeat."""
    model = tiny.build(CONFIGS / "glm4_moe.json", tmp_path / "model")
    with_multi_token_prediction(model)
    done("hf2megatron", model, tmp_path / "megatron", "-q", *mesh_options(mesh), *form.options)
    done("megatron2hf", tmp_path / "megatron", tmp_path / "back", "-q")
    assert tiny.differences(model, tmp_path / "back")[1] == []
    assert "model.layers.4.shared_head.head.weight" in load_file(tmp_path / "back" / "model.safetensors")


def of_model(mesh: Mesh, name: str) -> Mesh:
    """The mesh for a model: without `m` in the layout of one without multi-token prediction."""
    layout = mesh.pipeline_layout
    if layout is None or name == "deepseek_v3":
        return mesh
    return replace(mesh, pipeline_layout=layout.replace("m", ""))


def form_of(index: int) -> Form:
    return (TE, DIST, LOCAL)[index % 3]


@pytest.mark.parametrize("place", range(len(GRID)), ids=lambda place: name_of(GRID[place]))
def test_there_and_back_is_bit_identical(
    place: int, grid_model: TinyModel, converted: Converted, tmp_path: Path
) -> None:
    for index, name in enumerate(GRID_MODELS):
        checkpoint = converted(grid_model(name), of_model(GRID[place], name), form_of(place + index))
        done("megatron2hf", checkpoint, tmp_path / name, "-q")
        count, lines = tiny.differences(grid_model(name), tmp_path / name)
        assert lines == []
        assert count > 100


@pytest.mark.parametrize("place", range(len(GRID)), ids=lambda place: name_of(GRID[place]))
def test_inspected_and_planned_in_every_layout(place: int, grid_model: TinyModel, converted: Converted) -> None:
    """`inspect` names the layout and each stage's layers; a dry run away from it and back reads and writes everything."""
    name, form = GRID_MODELS[place % 3], form_of(place + place % 3)
    mesh = of_model(GRID[place], name)
    checkpoint = converted(grid_model(name), mesh, form)
    facts = done("inspect", checkpoint, "--json").json
    assert facts["problem"] is None
    sizes = {"tp": mesh.tp, "pp": mesh.pp, "vpp": virtual_stages(mesh), "ep": mesh.ep, "etp": mesh.expert_tp}
    assert facts["layout"] == sizes
    if form.format == "torch":
        counts = [len(chunk.layers) for chunk in chunks(mesh, GRID_LAYERS, int(name == "deepseek_v3"))]
        assert [layers_in(stage) for stage in facts["stages"]] == counts
    other = of_model(GRID[(place + 7) % len(GRID)], name)
    away = done("plan", "reshard", checkpoint, "--json", *mesh_options(other)).json
    back = done("plan", "megatron2hf", checkpoint, "--json").json
    assert away["bytes_read"] == back["bytes_read"] == facts["bytes"]
    assert back["summary"]["tensors_written"] > 100
    assert away["summary"]["tensors_written"] > 100


def layers_in(stage: str) -> int:
    """The number of layers in a line such as `stage 1 chunk 0: layers 2-3`."""
    numbers = [int(number) for number in re.findall(r"\d+", stage.partition(": ")[2])]
    return numbers[-1] - numbers[0] + 1 if numbers else 0


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def tensors(root: Path) -> dict[tuple[str, str, str], torch.Tensor | None]:
    """Every entry of every model chunk of every rank."""
    found = {}
    for path in root.rglob("model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        for chunk in (key for key in content if key.startswith("model")):
            found |= {(path.parent.name, chunk, name): value for name, value in content[chunk].items()}
    return found


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """The same tensors in the same places: bytes of torch_dist's shards and index, tensors of per-rank files."""
    left, right = files(a), files(b)
    assert left.keys() == right.keys()
    for name in left:
        assert name.endswith(".pt") or left[name] == right[name], name
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    for place, value in one.items():
        twin = other[place]
        assert value is twin is None or (value is not None and twin is not None and torch.equal(value, twin)), place


PAIRS = random.Random(3).sample([(a, b) for a in range(len(GRID)) for b in range(len(GRID)) if a != b], 24)


@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_resharded_it_equals_the_direct_conversion(
    start: int, end: int, grid_model: TinyModel, converted: Converted, tmp_path: Path
) -> None:
    for index, name in enumerate(GRID_MODELS):
        one, other = of_model(GRID[start], name), of_model(GRID[end], name)
        form, target = form_of(start + index), form_of(start + end + index)
        options = [*mesh_options(other), *target.options]
        done("reshard", converted(grid_model(name), one, form), tmp_path / name, "-q", *options)
        assert_same_checkpoint(tmp_path / name, converted(grid_model(name), other, target))


@pytest.mark.parametrize(
    ("name", "mesh", "form"),
    [
        ("deepseek_v3", GRID[-3], TE),
        ("deepseek_v3", GRID[-2], DIST),
        ("deepseek_v3", GRID[-1], LOCAL),
        ("deepseek_v3", Mesh(tp=2, pp=3, vpp=2, ep=2, etp=1, last_stage_layers=2), TE),
        ("mixtral", Mesh(tp=2, pp=2, vpp=2, ep=2, account_for_embedding=True, account_for_loss=True), LOCAL),
        ("qwen3_moe", Mesh(pp=2, vpp=2, first_stage_layers=2), DIST),
    ],
    ids=name_of,
)
def test_uneven_stages_and_layout_strings_give_the_logits(
    name: str, mesh: Mesh, form: Form, grid_model: TinyModel, converted: Converted, record_property: Record
) -> None:
    model = grid_model(name)
    assert ratio(model, converted(model, of_model(mesh, name), form), record_property) < EXACT


def test_etp_that_per_rank_files_cannot_hold_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    result = command("hf2megatron", tiny_model("mixtral"), tmp_path / "out", "--format", "torch", "--ep", 2, "--etp", 2)
    assert result.code == 2
    assert "torch_dist" in result.err


# --- what megatron-core saved ----------------------------------------------------------------------------------------

VERSIONS = ("0.14.0", "0.16.1", "0.19.2", "0.19.2-te")
BOTH = ("torch", "torch_dist")


def distance(logits: torch.Tensor, stored: dict[str, torch.Tensor]) -> float:
    return float((logits.flatten(0, -2) - stored["logits"].flatten(0, 1)).abs().max() / stored["logits"].std())


def megatron_logits(checkpoint: Path, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    opened = read_megatron(checkpoint)
    prompts = PromptSet(tuple(tuple(row) for row in stored["ids"].tolist()))
    return run_side(MegatronSide(checkpoint, opened.architecture, opened.mesh), prompts).logits


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("version", VERSIONS)
def test_saved_experts_give_the_savers_logits_on_both_sides(version: str, form: str, tmp_path: Path) -> None:
    saved = DATA / version / "moe"
    stored = torch.load(saved / "logits.pt")
    done("megatron2hf", saved / form, tmp_path / "hf", "-q")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "mixtral"
    with torch.no_grad():
        assert distance(load(tmp_path / "hf")(stored["ids"]).logits, stored) < EXACT
    assert distance(megatron_logits(saved / form, stored), stored) < EXACT


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("version", ["0.16.1", "0.19.2"])
def test_saved_experts_of_some_layers_give_the_savers_logits(version: str, form: str, tmp_path: Path) -> None:
    saved = DATA / version / "moefreq"
    stored = torch.load(saved / "logits.pt")
    assert distance(megatron_logits(saved / form, stored), stored) < EXACT
    done("reshard", saved / form, tmp_path / "out", "-q", *mesh_options(Mesh(tp=2, pp=2, ep=2)), *TE.options)
    assert distance(megatron_logits(tmp_path / "out", stored), stored) < EXACT


MIXED = [("0.16.1", "moefreq"), ("0.19.2", "moefreq"), ("0.19.2-te", "moemla")]


@pytest.mark.parametrize(
    ("form", "mesh"),
    [(TE, Mesh(tp=2, ep=2)), (LOCAL, Mesh(tp=2, pp=2)), (DIST, Mesh(pp=4)), (DIST, Mesh(tp=2, ep=4, etp=1))],
    ids=name_of,
)
@pytest.mark.parametrize(("version", "kind"), MIXED)
def test_both_formats_of_a_save_reshard_to_the_same_tensors(
    version: str, kind: str, form: Form, mesh: Mesh, tmp_path: Path
) -> None:
    for source in BOTH:
        done("reshard", DATA / version / kind / source, tmp_path / source, "-q", *mesh_options(mesh), *form.options)
    assert_same_checkpoint(tmp_path / "torch", tmp_path / "torch_dist")
    assert done("verify", tmp_path / "torch", tmp_path / "torch_dist", "--level", "exact", "--json").json["same"]


def te_keys(section: str, *, last: bool) -> dict[str, set[str]]:
    """The keys of te-keys.txt: of a dense layer (`0`), an expert layer (`1`) and the rest. `last`: the sharded keys."""
    found: dict[str, set[str]] = {"0": set(), "1": set(), "": set()}
    text = (DATA / "te-keys.txt").read_text().split(f"## {section}\n")[1].split("## ")[0]
    for line in text.splitlines():
        key = line.split(" -> ")[-1].split()[0] if last else line.split()[0]
        parts = key.split(".")
        layer = parts[2] if key.startswith("decoder.layers.") else ""
        found[layer].add(".".join(parts[3:]) if layer else key)
    return found


def own_keys(names: set[str], expert_layers: tuple[int, ...]) -> dict[str, set[str]]:
    """The same of a checkpoint; all layers of a kind must agree."""
    layers: dict[str, list[set[str]]] = {"0": [], "1": [], "": [{n for n in names if "decoder.layers." not in n}]}
    for layer in range(4):
        start = f"decoder.layers.{layer}."
        held = {name.removeprefix(start) for name in names if name.startswith(start)}
        layers[str(int(layer in expert_layers))].append(held)
    assert all(one == same[0] for same in layers.values() for one in same)
    return {kind: same[0] for kind, same in layers.items()}


@pytest.mark.parametrize(
    ("version", "kind", "section", "absent"),
    [
        ("0.16.1", "moefreq", "moe layer_freq list", {"mlp.router.expert_bias"}),
        ("0.19.2-te", "moemla", "mla q_lora=24", set()),
    ],
)
@pytest.mark.parametrize("source", BOTH)
def test_resharded_keys_are_those_of_transformer_engine(
    version: str, kind: str, section: str, absent: set[str], source: str, tmp_path: Path
) -> None:
    done("reshard", DATA / version / kind / source, tmp_path / "torch", "-q", *TE.options)
    done("reshard", DATA / version / kind / source, tmp_path / "dist", "-q", *DIST.options)

    (place,) = (tmp_path / "torch").rglob("model_optim_rng.pt")
    ours = own_keys(set(torch.load(place, weights_only=False)["model"]), (1, 2, 3))
    for part, keys in te_keys(f"{section} state_dict", last=False).items():
        wanted = {key for key in keys if not key.endswith("core_attention._extra_state")}
        assert ours[part] == wanted - absent, part

    opened = read_megatron(tmp_path / "dist")
    ours = own_keys({key[1] for key in opened.headers} | {key.split("/")[0] for key in opened.ignored}, (1, 2, 3))
    for part, keys in te_keys(f"{section} sharded_state_dict", last=True).items():
        assert ours[part] >= keys - absent, part
        # beyond them only what the local spec asks for: its norms, and states of modules that it has
        for key in ours[part] - keys:
            assert key.endswith("._extra_state") or "layernorm." in key or "layer_norm_" in key, key


def test_args_that_are_not_those_of_the_tensors(tmp_path: Path) -> None:
    """Resharding says what it found instead and writes it into the args; an export is refused with the same words."""
    saved = DATA / "0.19.2-te" / "moemla" / "torch"
    result = done("reshard", saved, tmp_path / "out", "--json", *DIST.options, "--tp", 2)
    (note,) = result.json["notes"]
    for word in (
        "mla",
        "moe, layers: (0, 1, 2, 3) and (1, 2, 3)",
        "moe, expert bias",
        "moe, shared ffn size: 0 and 40",
    ):
        assert word in note
    args = read_megatron(tmp_path / "out").args
    assert (args["q_lora_rank"], args["kv_lora_rank"], args["moe_layer_freq"]) == (24, 16, [0, 1, 1, 1])
    assert (args["qk_head_dim"], args["qk_pos_emb_head_dim"], args["v_head_dim"]) == (8, 4, 8)
    assert "mscale" not in args  # no tensor shows it
    refused = command("megatron2hf", saved, tmp_path / "hf")
    assert refused.code == 1
    assert "moe, shared ffn size: 0 and 40" in refused.err


# --- planted faults --------------------------------------------------------------------------------------------------


def models(checkpoint: Path) -> Iterator[State]:
    for content in contents(checkpoint):
        yield content["model"]


def experts_of_another_rank(checkpoint: Path) -> None:
    """The experts of expert parallel ranks 0 and 1 exchanged, as a shift by one rank would have them."""
    paths = sorted(checkpoint.glob("*/mp_rank_*/model_optim_rng.pt"))
    held = [torch.load(path, weights_only=False) for path in paths]
    assert len(held) == 2
    one, other = held[0]["model"], held[1]["model"]
    for key in [key for key in one if ".experts.linear_" in key and not key.endswith("_extra_state")]:
        one[key], other[key] = other[key], one[key]
    for path, content in zip(paths, held, strict=True):
        torch.save(content, path)


def gate_and_up_swapped(checkpoint: Path) -> None:
    for number in range(8):
        edit_tensors(checkpoint, f".experts.linear_fc1.weight{number}", lambda value: torch.cat(value.chunk(2)[::-1]))


def one_expert_zeroed(checkpoint: Path) -> None:
    edit_tensors(checkpoint, "layers.1.mlp.experts.linear_fc2.weight5", torch.zeros_like)


def two_experts_exchanged(checkpoint: Path) -> None:
    """In one layer, one of their two linears."""
    at = "decoder.layers.3.mlp.experts.linear_fc2.weight"
    for model in models(checkpoint):
        model[at + "2"], model[at + "3"] = model[at + "3"].clone(), model[at + "2"].clone()


def shared_gate_dropped(checkpoint: Path) -> None:
    for model in models(checkpoint):
        for key in [key for key in model if key.endswith("shared_experts.gate_weight")]:
            del model[key]
    edit_args(checkpoint, moe_shared_expert_gate=False)


def router_rows_permuted(checkpoint: Path) -> None:
    edit_tensors(checkpoint, "layers.2.mlp.router.weight", lambda value: value.roll(1, 0))


def expert_bias_zeroed(checkpoint: Path) -> None:
    edit_tensors(checkpoint, ".router.expert_bias", torch.zeros_like)


def latent_norms_exchanged(checkpoint: Path) -> None:
    name = "decoder.layers.{}.self_attention.linear_kv_up_proj.layer_norm_weight"
    for model in models(checkpoint):
        model[name.format(1)], model[name.format(2)] = model[name.format(2)].clone(), model[name.format(1)].clone()


def key_rope_rows_in_halves(checkpoint: Path) -> None:
    """The 8 rope rows after the 16 latent ones in the order (0, 2, 4, 6, 1, 3, 5, 7) of Llama's rope."""
    order = torch.cat([torch.arange(16), 16 + torch.arange(8).reshape(4, 2).t().flatten()])
    edit_tensors(checkpoint, ".linear_kv_down_proj.weight", lambda value: value[order])


def query_rope_rows_in_halves(checkpoint: Path) -> None:
    order = torch.cat([torch.arange(16), 16 + torch.arange(8).reshape(4, 2).t().flatten()])
    edit_tensors(checkpoint, ".linear_q_proj.weight", lambda value: value.unflatten(0, (8, 24))[:, order].flatten(0, 1))


def keys_and_values_exchanged(checkpoint: Path) -> None:
    """The rows of each head's key and value, both 16."""
    edit_tensors(
        checkpoint, ".linear_kv_up_proj.weight", lambda value: value.unflatten(0, (8, 2, 16)).flip(1).flatten(0, 2)
    )


def in_args(**changes: object) -> Callable[[Path], None]:
    return lambda checkpoint: edit_args(checkpoint, **changes)


EP2 = Mesh(ep=2)
FAULTS: dict[str, tuple[str, Mesh, Callable[[Path], None]]] = {
    "experts_of_another_rank": ("mixtral", EP2, experts_of_another_rank),
    "gate_and_up_swapped": ("mixtral", Mesh(), gate_and_up_swapped),
    "softmax_over_all_experts": ("mixtral", Mesh(), in_args(moe_router_pre_softmax=True)),
    "one_expert_per_token_more": ("mixtral", Mesh(), in_args(moe_router_topk=3)),
    "shared_gate_dropped": ("qwen2_moe", Mesh(), shared_gate_dropped),
    "softmax_over_the_chosen": ("qwen2_moe", Mesh(), in_args(moe_router_pre_softmax=False)),
    "one_expert_zeroed": ("qwen2_moe_mixed", Mesh(), one_expert_zeroed),
    "router_rows_permuted": ("qwen3_moe", Mesh(), router_rows_permuted),
    "expert_bias_zeroed": ("glm4_moe", Mesh(), expert_bias_zeroed),
    "whole_heads_rotated": ("glm4_moe", Mesh(), in_args(rotary_percent=1.0)),
    "scaling_factor_dropped": ("dots1", Mesh(), in_args(moe_router_topk_scaling_factor=None)),
    "two_experts_exchanged": ("dots1", Mesh(), two_experts_exchanged),
    "latent_norms_exchanged": ("deepseek_v3", Mesh(), latent_norms_exchanged),
    "key_rope_rows_in_halves": ("deepseek_v3", Mesh(), key_rope_rows_in_halves),
    "keys_and_values_exchanged": ("deepseek_v3", Mesh(), keys_and_values_exchanged),
    "yarn_dropped": ("deepseek_v3", Mesh(), in_args(rope_type="rope", rotary_scaling_factor=1.0)),
    "yarn_softmax_scale_dropped": ("deepseek_v3", Mesh(), in_args(mscale_all_dim=0.0)),
    "groups_dropped": ("deepseek_v3", Mesh(), in_args(moe_router_num_groups=None, moe_router_group_topk=None)),
    "query_rope_rows_in_halves": ("moonlight", Mesh(), query_rope_rows_in_halves),
    "scaling_of_another_model": ("moonlight", Mesh(), in_args(moe_router_topk_scaling_factor=2.5)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_rejected(
    fault: str, tiny_model: TinyModel, converted: Converted, tmp_path: Path, record_property: Record
) -> None:
    name, mesh, plant = FAULTS[fault]
    wrong = shutil.copytree(converted(tiny_model(name), mesh), tmp_path / "wrong")
    plant(wrong)
    result = command("verify", tiny_model(name), wrong, "--level", "logits", "--json", "-q")
    assert result.code == 1, result.out
    (level,) = result.json["levels"]
    assert level["problems"] == []
    record_property("ratio", level["ratio"])
    assert level["ratio"] > 10 * level["threshold"]
    assert level["first_diverging"]


@pytest.mark.parametrize(("name", "mesh"), sorted({entry[:2] for entry in FAULTS.values()}, key=str), ids=name_of)
def test_without_a_fault_it_passes(name: str, mesh: Mesh, tiny_model: TinyModel, converted: Converted) -> None:
    done("verify", tiny_model(name), converted(tiny_model(name), mesh), "-q", "--level", "logits")


def test_a_fault_in_torch_dist_is_rejected(tiny_model: TinyModel, converted: Converted, tmp_path: Path) -> None:
    wrong = shutil.copytree(converted(tiny_model("mixtral"), EP2), tmp_path / "wrong")
    experts_of_another_rank(wrong)
    done("reshard", wrong, tmp_path / "dist", "-q", *DIST.options, *mesh_options(Mesh(tp=2, ep=4)))
    for level in ("exact", "logits"):
        assert command("verify", tiny_model("mixtral"), tmp_path / "dist", "--level", level, "-q").code == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_tells_right_from_wrong_where_rounding_changes_the_experts(
    dtype: str, tiny_model: TinyModel, converted: Converted, tmp_path: Path
) -> None:
    """bf16 routes some tokens of a random model elsewhere: there, and only there, much may differ."""
    right = converted(tiny_model("mixtral"), EP2)
    wrong = shutil.copytree(right, tmp_path / "wrong")
    edit_tensors(wrong, "layers.1.mlp.experts.linear_fc2.weight2", torch.zeros_like)
    options = ("--level", "logits", "--dtype", dtype, "--json", "-q")
    (level,) = done("verify", tiny_model("mixtral"), right, *options).json["levels"]
    assert level["largest"] / level["std"] > 0.1
    (level,) = command("verify", tiny_model("mixtral"), wrong, *options).json["levels"]
    assert level["passed"] is False
    assert level["ratio"] > level["threshold"]


def test_an_expert_that_is_missing_is_named(tiny_model: TinyModel, converted: Converted, tmp_path: Path) -> None:
    wrong = shutil.copytree(converted(tiny_model("mixtral"), EP2), tmp_path / "wrong")
    for model in models(wrong):
        del model["decoder.layers.1.mlp.experts.linear_fc1.weight3"]
    result: dict[str, Any] = command("verify", tiny_model("mixtral"), wrong, "--level", "logits", "--json", "-q").json
    (problem,) = result["levels"][0]["problems"]
    assert "missing: decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight" in problem
