"""Checkpoints as other versions and other runs of Megatron-LM leave them: read like those that shardtool writes.

Each is made from a converted one with plain torch, as that version's code lays it out, and must give the model back bit
for bit.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import command, convert, done
from shardtool import tiny
from shardtool.checkpoint.megatron import read_megatron

sys.path.append(str(Path(__file__).parents[1] / "oracle"))

from faults import contents

TinyModel = Callable[[str], Path]
State = dict[str, Any]

DOWN = re.compile(r"(.*\.self_attention\.)linear_(q|kv)_down_proj\.weight")


def options(**sizes: object) -> list[object]:
    return [word for name, value in sizes.items() for word in ("--" + name.replace("_", "-"), value)]


def rank(path: Path, index: int) -> int:
    """A number of a folder's name: 0 is tp."""
    return int(path.parent.name.split("_")[2 + index])


def edit(checkpoint: Path, change: Callable[[State, int], State]) -> None:
    """Replace every model chunk of every rank; `change` sees the chunk and the tp rank."""
    paths = sorted(checkpoint.glob("*/mp_rank_*/model_optim_rng.pt"))
    for content, path in zip(contents(checkpoint), paths, strict=True):
        for key in [key for key in content if key.startswith("model")]:
            content[key] = change(content[key], rank(path, 0))


def assert_gives_back(checkpoint: Path, model: Path, out: Path) -> None:
    done("megatron2hf", checkpoint, out, "-q")
    count, lines = tiny.differences(model, out)
    assert lines == []
    assert count > 20


# --- expert tensor parallel ------------------------------------------------------------------------------------------

GRIDS = [(2, 4, 1), (4, 4, 2), (4, 2, 2), (2, 2, 2), (4, 8, 1), (4, 4, 3)]  # tp, ep, etp; the last divides nothing


def forget_etp(checkpoint: Path, etp: int, how: str) -> None:
    """Args of a run that leaves etp to its default (`none`, 0.14 and later), that are older (`absent`), or `wrong`."""
    for content in contents(checkpoint):
        args = content["args"]
        if how == "absent":
            del args.expert_tensor_parallel_size
        else:
            args.expert_tensor_parallel_size = None if how == "none" else 5 - etp


def keep_ranks(checkpoint: Path, tp: int, numbers: range, ep: int, etp: int) -> None:
    """Only the files that these ranks of one pipeline stage write."""
    kept = {f"mp_rank_{number % tp:02d}_{number // etp % ep:03d}" for number in numbers}
    for folder in checkpoint.glob("*/mp_rank_*"):
        if folder.name not in kept:
            shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["none", "absent", "wrong"])
@pytest.mark.parametrize(("tp", "ep", "etp"), GRIDS)
def test_etp_follows_from_the_shapes(
    tp: int, ep: int, etp: int, how: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    saved = convert(model, tmp_path / "saved", "--format", "torch", *options(tp=tp, ep=ep, etp=etp))
    forget_etp(saved, etp, how)
    facts = done("inspect", saved, "--json").json
    assert facts["layout"] == {"tp": tp, "pp": 1, "vpp": 1, "ep": ep, "etp": etp}
    assert_gives_back(saved, model, tmp_path / "back")


@pytest.mark.parametrize("version", ["0.18", "0.19"])
@pytest.mark.parametrize(("tp", "ep", "etp"), [(2, 3, 1), (4, 4, 1), (4, 2, 2), (4, 8, 1)])
def test_ranks_that_writers_leave_out(
    version: str, tp: int, ep: int, etp: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """0.18: the ranks of the first expert data parallel group; 0.19: and of the first dense one."""
    model = tiny_model("mixtral") if ep != 3 else six_experts(tmp_path)
    saved = convert(model, tmp_path / "saved", "--format", "torch", *options(tp=tp, ep=ep, etp=etp))
    before = len(list(saved.glob("*/mp_rank_*")))
    keep_ranks(saved, tp, range(ep * etp if version == "0.18" else max(tp, ep * etp)), ep, etp)
    assert len(list(saved.glob("*/mp_rank_*"))) < before or (tp, ep) != (2, 3)
    forget_etp(saved, etp, "none")
    assert_gives_back(saved, model, tmp_path / "back")
    report = done("verify", model, saved, "--level", "accounting", "--level", "exact", "--json", "-q").json
    assert report["same"] is True


def six_experts(root: Path) -> Path:
    config = json.loads((Path(__file__).parents[2] / "configs" / "tiny" / "mixtral.json").read_text())
    return tiny.build(config | {"num_local_experts": 6}, root / "six")


def test_a_dense_shard_that_no_rank_has_written_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    """tp 4, ep 2, etp 1: writers to 0.18 wrote tp 0 and 1 only."""
    saved = convert(tiny_model("mixtral"), tmp_path / "saved", "--format", "torch", *options(tp=4, ep=2, etp=1))
    keep_ranks(saved, 4, range(2), 2, 1)
    result = command("megatron2hf", saved, tmp_path / "out")
    assert result.code == 1
    assert "no file for tp 2 pp 0, tp 3 pp 0" in result.err
    assert not (tmp_path / "out").exists()


def test_an_expert_shard_that_no_rank_has_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    saved = convert(tiny_model("mixtral"), tmp_path / "saved", "--format", "torch", *options(tp=2, ep=2))
    shutil.rmtree(next(saved.glob("*/mp_rank_01_001")))
    forget_etp(saved, 2, "none")
    result = command("megatron2hf", saved, tmp_path / "out")
    assert result.code == 1
    assert "no file for pp 0 ep 1 etp 1" in result.err


def test_files_of_every_combination_are_compared(tiny_model: TinyModel, tmp_path: Path) -> None:
    """More files than ranks: copies, and as such compared."""
    model = tiny_model("mixtral")
    saved = convert(model, tmp_path / "saved", "--format", "torch", *options(tp=2, ep=2, etp=1))
    folder = next(saved.glob("*/mp_rank_00_000"))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mp_rank_00_000", "mp_rank_01_001"]
    dense, experts = (torch.load(folder.parent / name / "model_optim_rng.pt", weights_only=False)
                      for name in ("mp_rank_01_001", "mp_rank_00_000"))  # fmt: skip
    for key in [key for key in dense["model"] if ".experts." in key]:
        dense["model"][key] = experts["model"][key]
    (folder.parent / "mp_rank_01_000").mkdir()
    path = folder.parent / "mp_rank_01_000" / "model_optim_rng.pt"
    torch.save(dense, path)
    assert_gives_back(saved, model, tmp_path / "back")
    dense["model"]["decoder.layers.1.mlp.experts.linear_fc2.weight1"][3, 4] += 1
    torch.save(dense, path)
    result = command("megatron2hf", saved, tmp_path / "out")
    assert result.code == 1
    assert "mp_rank_01_000" in result.err


def test_launch_flags_name_the_experts_and_their_layout(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    saved = convert(model, tmp_path / "saved", "--format", "torch", *options(tp=2, ep=4, etp=1))
    given = done("args", saved).out.split()
    for flag, value in (("--expert-model-parallel-size", "4"), ("--expert-tensor-parallel-size", "1")):
        assert given[given.index(flag) + 1] == value
    whole = done("args", model).out
    for flag in ("--num-experts 8", "--moe-layer-freq", "--moe-router-score-function sigmoid", "--q-lora-rank"):
        assert flag in whole
    assert "--expert-model-parallel-size" not in whole


# --- latent attention ------------------------------------------------------------------------------------------------


def cut_down_projections(model: State, tp: int) -> State:
    """As Transformer Engine's spec had them to 0.13: column parallel."""
    return {key: value.chunk(2)[tp].clone() if DOWN.fullmatch(key) else value for key, value in model.items()}


def fuse_down_projections(model: State, tp: int, *, cut: bool = True) -> State:
    """0.17 and newer with mla_down_proj_fusion: FusedMLASelfAttention behind a fused norm."""
    fused: State = {}
    for key, value in model.items():
        if match := DOWN.fullmatch(key):
            if match[2] == "kv":
                parts = [model[match[1] + f"linear_{part}_down_proj.weight"] for part in ("q", "kv")]
                parts = [part.chunk(2)[tp] for part in parts] if cut else parts
                fused[match[1] + "linear_qkv_down_proj.weight"] = torch.cat(parts)
        elif key.endswith("input_layernorm.weight"):
            layer = key.removesuffix("input_layernorm.weight")
            fused[layer + "self_attention.linear_qkv_down_proj.layer_norm_weight"] = value
        elif not re.search(r"(linear_k?v?q?_down_proj|input_layernorm)\._extra_state", key):
            fused[key] = value
    return fused


@pytest.mark.parametrize(
    "change",
    [cut_down_projections, fuse_down_projections, lambda model, tp: fuse_down_projections(model, tp, cut=False)],
    ids=["cut", "fused", "fused-whole"],
)
@pytest.mark.parametrize("spec", ["te", "local"])
def test_down_projections_of_other_versions(
    spec: str, change: Callable[[State, int], State], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """In files with Transformer Engine's names, or with the other norms' local ones."""
    model = tiny_model("deepseek_v3")
    saved = convert(model, tmp_path / "saved", "--format", "torch", *options(tp=2, pp=2))
    edit(saved, change)
    if spec == "local":
        edit(saved, lambda state, _: {local_name(key): value for key, value in state.items()})
    assert done("inspect", saved, "--json").json["spec"] == spec
    assert_gives_back(saved, model, tmp_path / "back")
    done("reshard", saved, tmp_path / "again", "--format", "torch", "-q", *options(tp=2, pp=1, spec="te"))
    keys = next(iter(contents(tmp_path / "again")))["model"]
    assert not any("qkv_down" in key for key in keys)
    rows = json.loads((model / "config.json").read_text())
    whole = keys["decoder.layers.0.self_attention.linear_kv_down_proj.weight"]
    assert whole.shape[0] == rows["kv_lora_rank"] + rows["qk_rope_head_dim"]


def local_name(key: str) -> str:
    key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return re.sub(r"linear_(q|kv)_up_proj\.layer_norm_weight", r"\1_layernorm.weight", key)


def test_a_fused_projection_that_tp_cannot_cut(tiny_model: TinyModel, tmp_path: Path) -> None:
    saved = convert(tiny_model("deepseek_v3"), tmp_path / "saved", "--format", "torch", *options(tp=2))
    edit(saved, fuse_down_projections)
    edit(saved, lambda state, _: {
        key: value[:, :-1].clone() if key.endswith("linear_q_up_proj.weight") else value for key, value in state.items()
    })  # fmt: skip
    result = command("inspect", saved)
    assert result.code == 1
    assert "the fused down projection cannot be cut" in result.out + result.err


def test_the_norm_of_019_before_the_query_projection(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Resharded in both formats, refused as a Hugging Face model; without it a note says for which versions it is."""
    model = tiny_model("moonlight")
    result = done("hf2megatron", model, tmp_path / "plain", "--format", "torch", "--json", "-q")
    assert "for megatron-core 0.18 and older" in " ".join(result.json["notes"])
    at = "self_attention.linear_q_proj."
    norms: dict[str, torch.Tensor] = {}

    def add(state: State, _: int) -> State:
        for key in [key for key in state if key.endswith(at + "weight")]:
            norms[key] = state[key.replace(at + "weight", at + "layer_norm_weight")] = torch.randn(state[key].shape[1])
        return state

    edit(tmp_path / "plain", add)
    done("reshard", tmp_path / "plain", tmp_path / "dist", "--format", "torch_dist", "-q", *options(tp=2, pp=2))
    done("reshard", tmp_path / "dist", tmp_path / "back", "--format", "torch", "-q", *options(tp=1, pp=1))
    found = next(iter(contents(tmp_path / "back")))["model"]
    assert len(norms) == 4
    for key, value in norms.items():
        assert torch.equal(found[key.replace("weight", "layer_norm_weight")], value)
    for checkpoint in (tmp_path / "plain", tmp_path / "dist"):
        refused = command("megatron2hf", checkpoint, tmp_path / "hf")
        assert refused.code == 1
        assert "a norm of its own before linear_q_proj" in refused.err


# --- experts in one tensor -------------------------------------------------------------------------------------------


def transposed(state: State, _: int) -> State:
    """Legacy GroupedMLP to 0.16: memory is [experts, in, out], the nominal shape has two dims."""
    return in_one_tensor(state, "weight{}", lambda held, linear: flattened(torch.stack([w.t() for w in held]), linear))


def flattened(value: torch.Tensor, linear: int) -> torch.Tensor:
    shape = (value.shape[1], -1) if linear == 1 else (-1, value.shape[2])
    return value.contiguous().view(shape)


def single(state: State, _: int) -> State:
    """0.19 with moe_single_grouped_weight."""
    return in_one_tensor(state, "linear_fc{}.weight", lambda held, _: torch.stack(held))


def in_one_tensor(state: State, name: str, join: Callable[[list[torch.Tensor], int], torch.Tensor]) -> State:
    found = {key: value for key, value in state.items() if ".experts." not in key}
    for prefix in sorted({key.split("linear_fc")[0] for key in state if ".experts.linear_fc" in key}):
        for linear in (1, 2):
            held = [key for key in state if re.fullmatch(re.escape(f"{prefix}linear_fc{linear}.weight") + r"\d+", key)]
            ordered = [state[f"{prefix}linear_fc{linear}.weight{number}"] for number in range(len(held))]
            found[prefix + name.format(linear)] = join(ordered, linear)
    return found


@pytest.mark.parametrize("change", [transposed, single])
@pytest.mark.parametrize(("tp", "pp", "ep", "etp"), [(1, 1, 1, 1), (2, 2, 2, 2), (2, 1, 4, 1), (4, 1, 4, 2)])
def test_all_experts_in_one_tensor(
    change: Callable[[State, int], State], tp: int, pp: int, ep: int, etp: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("qwen2_moe_mixed")
    saved = convert(model, tmp_path / "saved", "--format", "torch", *options(tp=tp, pp=pp, ep=ep, etp=etp))
    edit(saved, change)
    forget_etp(saved, etp, "none")
    assert_gives_back(saved, model, tmp_path / "back")


def test_interleaved_gate_and_up_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    saved = convert(tiny_model("mixtral"), tmp_path / "saved", "--format", "torch")
    for content in contents(saved):
        content["args"].moe_mlp_glu_interleave_size = 32
    for result in (command("megatron2hf", saved, tmp_path / "out"), command("reshard", saved, tmp_path / "out")):
        assert result.code == 1
        assert "gate and up rows in alternating blocks" in result.err


# --- multi-token prediction ------------------------------------------------------------------------------------------


def test_an_mtp_layer_that_is_repeated(tmp_path: Path) -> None:
    """One layer, applied twice: resharded with its args, also into a layout string that counts it twice."""
    saved = convert(with_mtp(tmp_path), tmp_path / "saved", "--format", "torch")
    for content in contents(saved):
        content["args"].mtp_num_layers, content["args"].mtp_use_repeated_layer = 2, True
    layout = ["--pipeline-layout", "Ett|tt|mm|L", "--pp", 4]
    done("reshard", saved, tmp_path / "out", "-q", "--format", "torch", *layout)
    again = read_megatron(tmp_path / "out")
    assert (again.args["mtp_num_layers"], again.args["mtp_use_repeated_layer"]) == (2, True)
    assert {key[1].split(".")[2] for key in again.headers if key[1].startswith("mtp.")} == {"0"}
    assert "--mtp-use-repeated-layer" in done("args", tmp_path / "out").out
    refused = command("megatron2hf", saved, tmp_path / "hf")
    assert refused.code == 1
    assert "applied 2 times" in refused.err


def with_mtp(root: Path) -> Path:
    from test_experts import with_multi_token_prediction

    config = json.loads((Path(__file__).parents[2] / "configs" / "tiny" / "deepseek_v3.json").read_text())
    model = tiny.build(config, root / "mtp")
    with_multi_token_prediction(model)
    return model


def test_both_names_of_the_layer_inside_an_mtp_layer(tmp_path: Path) -> None:
    model = with_mtp(tmp_path)
    for name in ("transformer_layer", "mtp_model_layer"):
        saved = convert(model, tmp_path / name, "--format", "torch", "--mtp-name", name, *options(tp=2, pp=2))
        held = {key for content in contents(saved) for key in content["model"] if key.startswith("mtp.")}
        assert any(f".{name}." in key for key in held)
        assert_gives_back(saved, model, tmp_path / f"{name}-back")
        done("reshard", saved, tmp_path / f"{name}-again", "-q", *options(tp=1, pp=1))
        assert read_megatron(tmp_path / f"{name}-again").spelling.mtp == name


def test_tied_embeddings_with_mtp_at_the_end_of_a_pipeline_are_refused(tmp_path: Path) -> None:
    """megatron-core 0.16.1 and newer fail in sharded_state_dict; per-rank files and other places work."""
    model = with_mtp(tmp_path)
    tied = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(tied))
    held = load_file(model / "model.safetensors")
    del held["lm_head.weight"]
    for key in [key for key in held if key.endswith("shared_head.head.weight")]:
        held[key] = held["model.embed_tokens.weight"].clone()
    from safetensors.torch import save_file

    save_file(held, model / "model.safetensors")
    result = command("hf2megatron", model, tmp_path / "out", "--format", "torch_dist", *options(pp=2))
    assert result.code == 2
    assert "tied embeddings with multi-token prediction" in result.err
    done("hf2megatron", model, tmp_path / "apart", "-q", "--pp", 3, "--pipeline-layout", "Ett|ttm|L")
    done("hf2megatron", model, tmp_path / "files", "-q", "--format", "torch", *options(pp=2))
    assert_gives_back(tmp_path / "files", model, tmp_path / "back")
