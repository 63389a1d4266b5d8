"""`diff` across formats and layouts: the same where it is the same, and the right name for what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import Result, command, done

TinyModel = Callable[[str], Path]
Megatron = Callable[..., Path]
State = dict[str, torch.Tensor]
LAYER = "model.layers.{}."


def edited(model: Path, out: Path, change: Callable[[State], None], **config: object) -> Path:
    """A copy of a directory with other tensors, and other entries of config.json."""
    shutil.copytree(model, out)
    state = load_file(out / "model.safetensors")
    change(state)
    save_file({name: value.contiguous() for name, value in state.items()}, out / "model.safetensors", {"format": "pt"})
    if config:
        file = out / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return out


def unchanged(_state: State) -> None:
    """Nothing."""


def compared(a: Path, b: Path) -> Result:
    """`diff A B --json`, which must say that they differ."""
    result = command("diff", a, b, "--json", "-q")
    assert result.code == 1, result.out + result.err
    assert result.json["same"] is False
    return result


def codes(result: Result) -> dict[str, list[str]]:
    """What was found: the codes of diagnoses by kind of finding."""
    found: dict[str, list[str]] = {}
    for finding in result.json["findings"]:
        held = found.setdefault(finding["kind"], [])
        held += [item["code"] for item in finding["diagnoses"] if item["code"] not in held]
    return found


# --- the same --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "tp", "pp"),
    [("llama", "torch", 2, 2), ("gpt2", "torch_dist", 2, 1), ("qwen2_tied", "torch", 1, 2)],
)
def test_a_conversion_has_the_same_tensors(
    name: str, form: str, tp: int, pp: int, tiny_model: TinyModel, megatron: Megatron
) -> None:
    model, converted = tiny_model(name), megatron(name, form, "te", tp, pp)
    for a, b in ((model, converted), (converted, model), (model, model)):
        report = done("diff", a, b, "--json", "-q").json
        assert report["same"] is True
        assert report["findings"] == []
        assert report["elements"] > 100_000


def test_two_layouts_of_experts_are_the_same(tiny_model: TinyModel, tmp_path: Path) -> None:
    done("hf2megatron", tiny_model("deepseek_v3"), tmp_path / "a", "-q", "--format", "torch", "--ep", 4, "--pp", 2)
    done("hf2megatron", tiny_model("deepseek_v3"), tmp_path / "b", "-q", "--tp", 2, "--ep", 2)
    done("diff", tmp_path / "a", tmp_path / "b", "-q")


def test_directories_of_an_unknown_architecture_go_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = edited(tiny_model("llama"), tmp_path / "a", unchanged, model_type="new", architectures=["New"])
    other = edited(model, tmp_path / "b", lambda state: state[LAYER.format(2) + "mlp.up_proj.weight"].mul_(2))
    done("diff", model, model, "-q")
    result = compared(model, other)
    assert codes(result) == {"values": ["scaled"]}
    assert result.json["findings"][0]["b"] == ["model.layers.2.mlp.up_proj.weight"]
    fewer = edited(other, tmp_path / "c", drop(LAYER.format(1)))
    assert codes(compared(model, fewer)) == {"missing": [], "values": ["scaled"]}


def test_other_configs_are_a_note(tiny_model: TinyModel, tmp_path: Path) -> None:
    other = edited(tiny_model("llama"), tmp_path / "b", unchanged, rms_norm_eps=1e-6)
    report = done("diff", tiny_model("llama"), other, "--json", "-q").json
    assert report["notes"] == ["the configs differ: epsilon of the norms: 1e-05 and 1e-06"]


# --- values ----------------------------------------------------------------------------------------------------------


def swap(state: State, one: str, other: str) -> None:
    state[one], state[other] = state[other], state[one]


def swap_all(one: str, other: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in [name for name in state if one in name]:
            swap(state, name, name.replace(one, other))

    return change


def each(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def apply(state: State) -> None:
        for name in [name for name in state if part in name]:
            state[name] = change(state[name])

    return apply


def experts_rotated(state: State) -> None:
    for layer in range(4):
        for part in ("w1", "w2", "w3"):
            names = [LAYER.format(layer) + f"block_sparse_moe.experts.{e}.{part}.weight" for e in range(8)]
            state |= dict(zip(names, [state[name] for name in (*names[3:], *names[:3])], strict=True))


def pairs(value: torch.Tensor) -> torch.Tensor:
    """Rope rows of heads of 8 as neighbouring pairs."""
    return value.view(-1, 2, 4, value.shape[1]).transpose(1, 2).reshape(value.shape)


def one_bit(value: torch.Tensor) -> torch.Tensor:
    value.view(torch.int32).view(-1)[777] ^= 1 << 22
    return value


NORM = "model.norm.weight"
DOWN = LAYER.format(1) + "mlp.down_proj.weight"
CHANGES: list[tuple[str, str, Callable[[State], None]]] = [
    ("gate_up_swapped", "llama", swap_all("gate_proj", "up_proj")),
    ("key_value_swapped", "llama", swap_all("k_proj", "v_proj")),
    ("layers_exchanged", "llama", swap_all(LAYER.format(1), LAYER.format(3))),
    ("rope_interleaved", "llama", each("k_proj", pairs)),
    ("off_by_one", "llama", each("norm", lambda value: value + 1)),
    ("scaled", "llama", each("lm_head", lambda value: value * 0.125)),
    ("negated", "llama", each("lm_head", torch.neg)),
    ("rounded", "llama", each("", lambda value: value.bfloat16().float())),
    ("zeroed", "llama", each(LAYER.format(2) + "self_attn.o_proj", torch.zeros_like)),
    ("transposed", "llama", each(LAYER.format(2) + "self_attn.o_proj", torch.t)),
    ("one_element", "llama", each(DOWN, one_bit)),
    ("moved", "llama", lambda state: state.update({NORM: state[LAYER.format(0) + "input_layernorm.weight"].clone()})),
    ("vocabulary_rows_shifted", "llama", each("lm_head", lambda value: torch.cat([value[:100], value[99:119]]))),
    ("partly_zeroed", "llama", each("lm_head", lambda value: torch.cat([value[:100], torch.zeros(20, 64)]))),
    ("mlp_rows_reversed", "llama", each(DOWN, lambda value: value.flip(1))),
    ("unknown", "llama", each("lm_head", torch.sin)),
    ("experts_rotated", "mixtral", experts_rotated),
    ("experts_exchanged", "mixtral", swap_all("layers.2.block_sparse_moe.experts.1.", "layers.2.block_sparse_moe.experts.6.")),
    ("positions_rotated", "gpt2", each("wpe", lambda value: value.roll(2, 0))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "name", "change"), CHANGES, ids=[code for code, _, _ in CHANGES])
def test_a_known_change_is_named(
    code: str, name: str, change: Callable[[State], None], tiny_model: TinyModel, tmp_path: Path
) -> None:
    result = compared(tiny_model(name), edited(tiny_model(name), tmp_path / "b", change))
    assert codes(result) == {"values": [code]}


def test_the_text_names_tensors_layers_and_parts(tiny_model: TinyModel, tmp_path: Path) -> None:
    b = edited(tiny_model("llama"), tmp_path / "b", each(LAYER.format(1) + "self_attn.k_proj", pairs))
    lines = command("diff", tiny_model("llama"), b, "-q").out.splitlines()
    assert lines[2:] == [
        "values   model.layers.1.self_attn.k_proj.weight: 1,536 of 2,048 elements",
        "           key: rope rows as neighbouring pairs where a has two halves",
        "different: 1 values; 138,816 elements compared",
    ]


# --- what is there ---------------------------------------------------------------------------------------------------


def drop(part: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return change


def test_fewer_layers_are_missing_and_more_are_extra(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    b = edited(model, tmp_path / "b", drop("layers.3."), num_hidden_layers=3)
    result = compared(model, b)
    assert codes(result) == {"missing": []}
    assert {name for finding in result.json["findings"] for name in finding["a"]} == {
        LAYER.format(3) + part + ".weight"
        for part in (
            "input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        )
    }  # fmt: skip
    assert codes(compared(b, model)) == {"extra": []}


def test_a_tensor_that_its_own_model_lacks_is_missing(
    tiny_model: TinyModel, megatron: Megatron, tmp_path: Path
) -> None:
    b = edited(tiny_model("llama"), tmp_path / "b", drop(DOWN))
    result = compared(megatron("llama", "torch", "te", 2, 2), b)
    assert codes(result) == {"missing": []}
    assert result.json["findings"][0]["a"] == ["decoder.layers.1.mlp.linear_fc2.weight"]


def test_names_that_nobody_knows(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    a = edited(model, tmp_path / "a", lambda state: state.update({"x.one": torch.ones(3), "x.two": torch.ones(2)}))
    b = edited(model, tmp_path / "b", lambda state: state.update({"x.one": torch.zeros(3)}))
    assert codes(compared(a, b)) == {"missing": [], "values": ["zeroed"]}


@pytest.mark.parametrize("config", [{}, {"vocab_size": 128}], ids=["not in config", "in config"])
def test_padded_rows(config: dict[str, object], tiny_model: TinyModel, tmp_path: Path) -> None:
    pad = each("lm_head", lambda value: torch.cat([value, torch.zeros(8, 64)]))
    embed = each("embed_tokens", lambda value: torch.cat([value, torch.zeros(8, 64)]))
    b = edited(tiny_model("llama"), tmp_path / "b", lambda state: (pad(state), embed(state)), **config)
    assert codes(compared(tiny_model("llama"), b)) == {"shape": ["padded_rows"]}


def test_a_transposed_matrix_of_another_shape(tiny_model: TinyModel, tmp_path: Path) -> None:
    b = edited(tiny_model("llama"), tmp_path / "b", each(DOWN, torch.t))
    result = compared(tiny_model("llama"), b)
    assert codes(result) == {"shape": ["transposed"]}
    assert result.json["findings"][0]["b"] == [DOWN]


def test_dtypes(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    b = edited(model, tmp_path / "b", each("", torch.Tensor.bfloat16), torch_dtype="bfloat16")
    assert codes(compared(model, b)) == {"dtype": ["rounded"]}
    assert codes(compared(b, model)) == {"dtype": ["rounded"]}
    wide = edited(b, tmp_path / "wide", each("", torch.Tensor.float))
    assert codes(compared(b, wide)) == {"dtype": ["same_values"]}


def test_two_models_that_have_little_in_common(tiny_model: TinyModel) -> None:
    found = codes(compared(tiny_model("llama"), tiny_model("gpt2")))
    assert {"missing", "extra", "shape", "values"} == set(found)


# --- Megatron's own faults -------------------------------------------------------------------------------------------


def test_shards_and_stages_exchanged(tiny_model: TinyModel, megatron: Megatron, tmp_path: Path) -> None:
    for tp, pp, names, code in ((2, 1, ("00", "01"), "tp_shards_exchanged"),):
        wrong = tmp_path / code
        shutil.copytree(megatron("llama", "torch", "te", tp, pp), wrong)
        one, other = (wrong / "release" / f"mp_rank_{name}" / "model_optim_rng.pt" for name in names)
        left, right = (torch.load(path, weights_only=False) for path in (one, other))
        for name in [name for name in left["model"] if name.endswith("linear_proj.weight")]:
            left["model"][name], right["model"][name] = right["model"][name], left["model"][name]
        torch.save(left, one)
        torch.save(right, other)
        assert codes(compared(tiny_model("llama"), wrong)) == {"values": [code]}


def test_usage(tmp_path: Path, tiny_model: TinyModel) -> None:
    assert command("diff", tiny_model("llama"), tmp_path / "nowhere", "-q").code == 2
    assert command("diff", tiny_model("llama")).code == 2
