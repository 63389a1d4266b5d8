"""Models whose weights Megatron holds while megatron-core computes another function: refused, converted where asked for.

No logits can judge them. The judge is the layout, stated once more in plain torch from what transformers saves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import command, convert, done
from faults import contents
from shardtool import tiny
from shardtool.checkpoint.megatron import read_megatron

State = dict[str, torch.Tensor]
TinyModel = Callable[[str], Path]
REASONS = {
    "olmoe": "over all heads at once",
    "ernie4_5_moe": "an expert bias to softmax scores",
    "deepseek_v2": "ranks groups of experts by their best 1",
}
LAYERS, GROUPS, HEADS, EXPERTS, PADDED = 4, 4, 8, 8, 256
TP, EP = 2, 2


def rows(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.chunk(TP)[rank]


def columns(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.chunk(TP, dim=1)[rank]


def gated(t: State, at: str, rank: int) -> torch.Tensor:
    return torch.cat([rows(t[f"{at}{half}_proj.weight"], rank) for half in ("gate", "up")])


def grouped_attention(t: State, at: str, rank: int) -> State:
    parts = [t[at + f"self_attn.{x}_proj.weight"] for x in "qkv"]
    grouped = torch.cat([part.view(GROUPS, -1, 64) for part in parts], dim=1)
    found = {
        "linear_qkv.layer_norm_weight": t[at + "input_layernorm.weight"],
        "linear_qkv.weight": grouped.chunk(TP)[rank].reshape(-1, 64),
        "linear_proj.weight": columns(t[at + "self_attn.o_proj.weight"], rank),
    }
    for x in "qk":
        if at + f"self_attn.{x}_norm.weight" in t:  # whole on every rank
            found[f"{x}_layernorm.weight"] = t[at + f"self_attn.{x}_norm.weight"]
    return {"self_attention." + name: value for name, value in found.items()}


def latent_attention(t: State, at: str, rank: int) -> State:
    inner, own = at + "self_attn.", "self_attention."
    return {
        "input_layernorm.weight": t[at + "input_layernorm.weight"],
        own + "linear_q_down_proj.weight": t[inner + "q_a_proj.weight"],
        own + "linear_q_up_proj.layer_norm_weight": t[inner + "q_a_layernorm.weight"],
        own + "linear_q_up_proj.weight": rows(t[inner + "q_b_proj.weight"], rank),
        own + "linear_kv_down_proj.weight": t[inner + "kv_a_proj_with_mqa.weight"],
        own + "linear_kv_up_proj.layer_norm_weight": t[inner + "kv_a_layernorm.weight"],
        own + "linear_kv_up_proj.weight": rows(t[inner + "kv_b_proj.weight"], rank),
        own + "linear_proj.weight": columns(t[inner + "o_proj.weight"], rank),
    }


def statement(t: State, tp: int, ep: int) -> State:
    """What rank (tp, ep) of one pipeline stage holds, under Transformer Engine's names."""
    zeros = torch.zeros(PADDED - 120, 64)
    found = {"embedding.word_embeddings.weight": rows(torch.cat([t["model.embed_tokens.weight"], zeros]), tp)}
    found["decoder.final_layernorm.weight"] = t["model.norm.weight"]
    if "lm_head.weight" in t:
        found["output_layer.weight"] = rows(torch.cat([t["lm_head.weight"], zeros]), tp)
    for number in range(LAYERS):
        at, layer = f"model.layers.{number}.", {}
        latent = at + "self_attn.kv_b_proj.weight" in t
        layer |= latent_attention(t, at, tp) if latent else grouped_attention(t, at, tp)
        norm = t[at + "post_attention_layernorm.weight"]
        if at + "mlp.gate.weight" in t:
            layer |= {"pre_mlp_layernorm.weight": norm, "mlp.router.weight": t[at + "mlp.gate.weight"]}
            for local in range(EXPERTS // EP):
                expert = at + f"mlp.experts.{ep * EXPERTS // EP + local}."
                layer[f"mlp.experts.linear_fc1.weight{local}"] = gated(t, expert, tp)
                layer[f"mlp.experts.linear_fc2.weight{local}"] = columns(t[expert + "down_proj.weight"], tp)
            if at + "mlp.shared_experts.down_proj.weight" in t:
                layer["mlp.shared_experts.linear_fc1.weight"] = gated(t, at + "mlp.shared_experts.", tp)
                down = t[at + "mlp.shared_experts.down_proj.weight"]
                layer["mlp.shared_experts.linear_fc2.weight"] = columns(down, tp)
            if at + "mlp.moe_statics.e_score_correction_bias" in t:
                layer["mlp.router.expert_bias"] = t[at + "mlp.moe_statics.e_score_correction_bias"][0]
        else:
            layer |= {"mlp.linear_fc1.layer_norm_weight": norm, "mlp.linear_fc1.weight": gated(t, at + "mlp.", tp)}
            layer["mlp.linear_fc2.weight"] = columns(t[at + "mlp.down_proj.weight"], tp)
        found |= {f"decoder.layers.{number}.{name}": value for name, value in layer.items()}
    return found


def wrong(model: Path, megatron: Path) -> list[str]:
    """The tensors of all ranks that are not as stated."""
    tensors, names = load_file(model / "model.safetensors"), []
    for tp in range(TP):
        for ep in range(EP):
            path = megatron / "release" / f"mp_rank_{tp:02d}_{ep:03d}" / "model_optim_rng.pt"
            held = torch.load(path, weights_only=False)["model"]
            held = {name: value for name, value in held.items() if not name.endswith("_extra_state")}
            stated = statement(tensors, tp, ep)
            assert held.keys() == stated.keys()
            names += [name for name, value in stated.items() if not torch.equal(held[name], value)]
    return names


@pytest.mark.parametrize("name", REASONS)
def test_it_is_refused_with_the_reason(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    for arguments in (("hf2megatron", tiny_model(name), tmp_path / "out"), ("plan", "hf2megatron", tiny_model(name))):
        result = command(*arguments)
        assert result.code == 2
        assert REASONS[name] in result.err
        assert "--allow-inexact" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", REASONS)
def test_where_asked_for_its_weights_are_where_they_belong(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(name)
    layout = ("--format", "torch", "--tp", TP, "--ep", EP)
    report = done("hf2megatron", model, tmp_path / "megatron", "--allow-inexact", "--json", *layout).json
    assert any(REASONS[name] in note for note in report["notes"])
    assert REASONS[name] in read_megatron(tmp_path / "megatron").args["hf_inexact"]
    assert wrong(model, tmp_path / "megatron") == []

    # megatron-core cannot be asked, and says why
    levels = ("--level", "accounting", "--level", "exact", "-q")
    done("verify", model, tmp_path / "megatron", *levels)
    result = command("verify", model, tmp_path / "megatron", "--level", "logits", "-q")
    assert result.code != 0
    assert REASONS[name] in result.out + result.err

    # a fault that both must find
    for content in contents(tmp_path / "megatron"):
        state = content["model"]
        one, other = (f"decoder.layers.2.mlp.experts.linear_fc2.weight{number}" for number in (0, 1))
        state[one], state[other] = state[other], state[one]
    assert {name.rpartition(".")[2] for name in wrong(model, tmp_path / "megatron")} == {"weight0", "weight1"}
    assert command("verify", model, tmp_path / "megatron", *levels).code == 1


@pytest.mark.parametrize("name", REASONS)
def test_there_and_back_by_way_of_other_layouts(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(name)
    layout = ("--format", "torch_dist", "--tp", 2, "--pp", 2, "--ep", 4, "--allow-inexact")
    megatron = convert(model, tmp_path / "megatron", *layout)
    report = done("reshard", megatron, tmp_path / "resharded", "--format", "torch", "--pp", 2, "--vpp", 2, "--spec", "local",
                  "--experts", "sequential", "--json").json  # fmt: skip
    assert any(REASONS[name] in note for note in report["notes"])
    for checkpoint in ("megatron", "resharded"):
        report = done("megatron2hf", tmp_path / checkpoint, tmp_path / f"{checkpoint}-hf", "--json").json
        assert any(REASONS[name] in note for note in report["notes"])
        assert tiny.differences(model, tmp_path / f"{checkpoint}-hf")[1] == []
