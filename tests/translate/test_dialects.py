"""The names that files of one family may have: transformers writes both dialects, and is the oracle of both.

A tiny model is saved twice by transformers itself, as it is published and with the names of its modules
(`save_original_format=False`); what shardtool writes must be these files, and every command must read either.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measure import edit_tensors, logits, ratio, same_bits, tensors

from commands import command, convert, done
from shardtool import tiny

Pair = Callable[[str], tuple[Path, Path]]
TinyModel = Callable[[str], Path]
CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"

# published names, those of transformers' modules
NAMES = {
    "mixtral": ("per-expert", "fused"),
    "qwen2_moe_mixed": ("per-expert", "fused"),
    "qwen3_moe": ("per-expert", "fused"),
    "deepseek_v2": ("per-expert", "fused"),
    "deepseek_v3": ("per-expert", "fused"),
    "moonlight": ("per-expert", "fused"),
    "glm4_moe": ("per-expert", "fused"),
    "dots1": ("per-expert", "fused"),
    "olmoe": ("per-expert", "fused"),
    "ernie4_5_moe": ("per-expert", "fused"),
    "qwen3_next": ("per-expert", "fused"),
    "qwen3_5_moe": ("per-expert", "fused"),
    "granitemoe": ("original", "fused"),
    "gpt_neox": ("original", "lm_head"),
}


@pytest.fixture(scope="module")
def pair(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same tiny model in both dialects, both written by transformers. Read them, do not change them."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("dialects")

    def get(name: str) -> tuple[Path, Path]:
        source, out = tiny_model(name), root / name
        if not out.exists():
            AutoModelForCausalLM.from_pretrained(source).save_pretrained(out, save_original_format=False)
        return source, out

    return get


def model_type(directory: Path) -> str:
    return json.loads((directory / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_writes_in_either_dialect(name: str, pair: Pair, tmp_path: Path) -> None:
    source, modules = pair(name)
    assert tensors(source).keys() != tensors(modules).keys()
    own, other = NAMES[name]
    to = model_type(source)
    for start, wanted, expected in ((source, other, modules), (modules, own, source), (modules, other, modules)):
        out = tmp_path / f"{start.name}-{start is modules}-{wanted}"
        found = done("translate", start, out, "--to", to, "--dialect", wanted, "-q", "--json").json
        assert found["verdict"]["level"] == "identical"
        assert found["verdict"]["parameters_added"] == 0
        assert same_bits(tensors(out), tensors(expected))
        assert done("inspect", out, "--json").json["dialect"] == wanted
    done("translate", modules, tmp_path / "default", "--to", to, "-q")
    assert same_bits(tensors(tmp_path / "default"), tensors(source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_neox"])
def test_transformers_computes_the_same_from_both(name: str, dtype: torch.dtype, pair: Pair, tmp_path: Path) -> None:
    source, _ = pair(name)
    done("translate", source, tmp_path / "out", "--to", model_type(source), "--dialect", NAMES[name][1], "-q")
    assert torch.equal(logits(source, dtype), logits(tmp_path / "out", dtype))


@pytest.mark.parametrize(
    ("name", "options"),
    [("mixtral", ("--ep", 2)), ("qwen2_moe_mixed", ("--tp", 2, "--pp", 2)), ("deepseek_v3", ("--format", "torch_dist")),
     ("granitemoe", ("--ep", 4, "--format", "torch_dist")), ("gpt_neox", ("--tp", 2))],
)  # fmt: skip
def test_both_give_the_same_megatron_checkpoint(
    name: str, options: tuple[object, ...], pair: Pair, tmp_path: Path
) -> None:
    source, modules = pair(name)
    given = options if "--format" in options else (*options, "--format", "torch")
    a, b = (convert(model, tmp_path / f"{number}", *given) for number, model in enumerate((source, modules)))
    files = [file.relative_to(a) for file in a.rglob("*") if file.is_file() and file.name != "shardtool.json"]
    assert files
    assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)
    assert command("diff", modules, a).code == 0
    assert command("diff", source, modules).code == 0
    for one, other in ((modules, a), (source, modules)):
        done("verify", one, other, "--level", "accounting", "--level", "exact")
    for wanted, expected in zip(NAMES[name], (source, modules), strict=True):
        done("megatron2hf", a, tmp_path / wanted, "--dialect", wanted, "-q")
        back, before = tensors(tmp_path / wanted), tensors(expected)
        # Granite's factors are in Megatron's weights: its values come back within a rounding
        assert back.keys() == before.keys() if name == "granitemoe" else same_bits(back, before)
    rules = done("plan", "megatron2hf", a, "--dialect", NAMES[name][1], "--json").json["plan"]["rules"]
    held = tensors(modules).keys() - tensors(source).keys()
    shown = {text.replace("{l}", "1") for rule in rules for text in rule["hf"]}
    assert {text for text in held if re.search(r"layers\.1\.", text) or "layers" not in text} <= shown


def planted(source: Path, out: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(source, out)
    edit_tensors(out, lambda t: t.update({k: change(v) for k, v in t.items() if k.endswith("experts.gate_up_proj")}))
    return out


def test_gate_and_up_swapped_in_the_fused_tensor(pair: Pair, tmp_path: Path) -> None:
    source, modules = pair("mixtral")
    wrong = planted(modules, tmp_path / "wrong", lambda t: torch.cat(t.chunk(2, 1)[::-1], 1))
    result = command("diff", source, wrong, "--json")
    assert result.code == 1
    assert "gate_up_swapped" in result.out
    done("translate", wrong, tmp_path / "out", "--to", "mixtral", "-q")
    assert not same_bits(tensors(tmp_path / "out"), tensors(source))
    assert ratio(logits(source, torch.float32), logits(tmp_path / "out", torch.float32)) > 1e-2


def test_a_transposed_fused_tensor_is_refused(pair: Pair, tmp_path: Path) -> None:
    """[expert, hidden, 2 x intermediate], as gpt-oss and Llama 4 have it."""
    source, modules = pair("mixtral")
    wrong = planted(modules, tmp_path / "wrong", lambda t: t.transpose(1, 2))
    result = command("hf2megatron", wrong, tmp_path / "out", "-q")
    assert result.code == 1
    assert "wrong shape: model.layers.{0-3}.mlp.experts.gate_up_proj" in result.err
    assert command("diff", source, wrong).code == 1


def test_transposed_where_the_shape_stays_the_same(pair: Pair, tmp_path: Path) -> None:
    """2 x intermediate = hidden: no shape tells; the tensors are others, which diff says and the logits show."""
    source, modules = pair("qwen3_moe")
    wrong = planted(modules, tmp_path / "wrong", lambda t: t.transpose(1, 2))
    assert tensors(wrong).keys() == tensors(modules).keys()
    found = command("diff", source, wrong, "--json")
    assert found.code == 1
    done("translate", wrong, tmp_path / "out", "--to", "qwen3_moe", "-q")
    assert ratio(logits(source, torch.float32), logits(tmp_path / "out", torch.float32)) > 1e-2


def test_a_layer_in_each_dialect_is_refused(pair: Pair, tmp_path: Path) -> None:
    source, modules = pair("qwen3_moe")
    shutil.copytree(modules, tmp_path / "both")
    other = {name: value for name, value in tensors(source).items() if "layers.0.mlp.experts" in name}
    edit_tensors(tmp_path / "both", lambda t: t.update(other))
    result = command("hf2megatron", tmp_path / "both", tmp_path / "out", "-q")
    assert result.code == 1
    assert "not known to this architecture" in result.err or "missing" in result.err


@pytest.mark.parametrize(("name", "to", "wanted"), [("llama", "qwen2", "fused"), ("mixtral", "mixtral", "stacked")])
def test_a_dialect_that_there_is_not(name: str, to: str, wanted: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    result = command("translate", tiny_model(name), tmp_path / "out", "--to", to, "--dialect", wanted)
    assert result.code == 2
    assert f"--dialect '{wanted}': {to} has no such names on disk" in result.err
    assert not (tmp_path / "out").exists()


def test_multi_token_prediction_may_have_another_dialect_than_the_layers(tmp_path: Path) -> None:
    """Layers fused, the experts behind them one by one: every rule is decided by what is there."""
    config = json.loads((CONFIGS / "deepseek_v3.json").read_text())
    source = tiny.build(config, tmp_path / "in")
    count, depth = config["num_hidden_layers"], 1
    at, behind = f"model.layers.{count - 1}.", f"model.layers.{count}."

    def with_mtp(t: dict[str, torch.Tensor]) -> None:
        hidden = config["hidden_size"]
        t.update({behind + name.removeprefix(at): value.clone() for name, value in t.items() if name.startswith(at)})
        t.update({behind + f"{name}.weight": torch.randn(hidden) for name in ("enorm", "hnorm", "shared_head.norm")})
        t[behind + "eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
        t[behind + "embed_tokens.weight"] = t["model.embed_tokens.weight"].clone()
        t[behind + "shared_head.head.weight"] = t["lm_head.weight"].clone()

    def fused(t: dict[str, torch.Tensor]) -> None:
        for layer in range(config["first_k_dense_replace"], count):
            experts = f"model.layers.{layer}.mlp.experts."
            names = [[experts + f"{e}.{n}_proj.weight" for n in ("gate", "up", "down")]
                     for e in range(config["n_routed_experts"])]  # fmt: skip
            t[experts + "gate_up_proj"] = torch.stack([torch.cat([t[gate], t[up]]) for gate, up, _ in names])
            t[experts + "down_proj"] = torch.stack([t[down] for _, _, down in names])
            for one in names:
                for name in one:
                    del t[name]

    from measure import edit_config

    edit_config(source, num_nextn_predict_layers=depth)
    edit_tensors(source, with_mtp)
    shutil.copytree(source, tmp_path / "mixed")
    edit_tensors(tmp_path / "mixed", fused)
    assert done("inspect", tmp_path / "mixed", "--json").json["dialect"] == "fused, per-expert"
    done("translate", tmp_path / "mixed", tmp_path / "out", "--to", "deepseek_v3", "-q")
    assert same_bits(tensors(tmp_path / "out"), tensors(source))
