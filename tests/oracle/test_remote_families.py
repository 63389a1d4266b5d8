"""Families whose code is not in transformers: a twin in transformers, laid out by hand in the family's own files.

The twin's weights go into the other family's tensors by plain torch statements of its layout; the conversion of these
files, run in megatron-core, must be the twin.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from commands import command, convert, done
from faults import edit_args, edit_tensors

State = dict[str, torch.Tensor]
CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
LAYERS, HEADS, GROUPS, DIM = 4, 8, 4, 8


def qwen(t: State) -> State:
    """From qwen2 with as many groups as heads: thirds of c_attn, w2 gate, w1 up."""
    out = {"transformer.wte.weight": t["model.embed_tokens.weight"], "transformer.ln_f.weight": t["model.norm.weight"]}
    out["lm_head.weight"] = t["lm_head.weight"]
    for n in range(LAYERS):
        a, b = f"model.layers.{n}.", f"transformer.h.{n}."
        for kind in ("weight", "bias"):
            out[b + f"attn.c_attn.{kind}"] = torch.cat([t[a + f"self_attn.{x}_proj.{kind}"] for x in "qkv"])
        out[b + "attn.c_proj.weight"] = t[a + "self_attn.o_proj.weight"]
        out[b + "mlp.w1.weight"], out[b + "mlp.w2.weight"] = t[a + "mlp.up_proj.weight"], t[a + "mlp.gate_proj.weight"]
        out[b + "mlp.c_proj.weight"] = t[a + "mlp.down_proj.weight"]
        out[b + "ln_1.weight"], out[b + "ln_2.weight"] = (
            t[a + "input_layernorm.weight"],
            t[a + "post_attention_layernorm.weight"],
        )
    return out


def internlm2(t: State) -> State:
    """From llama: wqkv is, per group, its query heads, its key, its value."""
    out = {"model.tok_embeddings.weight": t["model.embed_tokens.weight"], "model.norm.weight": t["model.norm.weight"]}
    out["output.weight"] = t["lm_head.weight"]
    for n in range(LAYERS):
        a = f"model.layers.{n}."
        q = t[a + "self_attn.q_proj.weight"].view(GROUPS, HEADS // GROUPS, DIM, -1)
        k, v = (t[a + f"self_attn.{x}_proj.weight"].view(GROUPS, 1, DIM, -1) for x in "kv")
        out[a + "attention.wqkv.weight"] = torch.cat([q, k, v], dim=1).reshape(-1, q.shape[-1])
        out[a + "attention.wo.weight"] = t[a + "self_attn.o_proj.weight"]
        for name, other in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            out[a + f"feed_forward.{name}.weight"] = t[a + f"mlp.{other}_proj.weight"]
        out[a + "attention_norm.weight"] = t[a + "input_layernorm.weight"]
        out[a + "ffn_norm.weight"] = t[a + "post_attention_layernorm.weight"]
    return out


def baichuan(t: State) -> State:
    """From llama with as many groups as heads: W_pack is q, k, v on top of each other."""
    out = {
        name: value
        for name, value in t.items()
        if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    for n in range(LAYERS):
        a = f"model.layers.{n}.self_attn."
        out[a + "W_pack.weight"] = torch.cat([t[a + f"{x}_proj.weight"] for x in "qkv"])
    return out


def normalised_head(t: State) -> State:
    """What Baichuan 2 computes with its head."""
    return t | {"lm_head.weight": torch.nn.functional.normalize(t["lm_head.weight"])}


def baichuan2(t: State) -> State:
    """From llama with a normalised head: rows of any length, which the forward pass normalises."""
    head = t["lm_head.weight"]
    return baichuan(t) | {"lm_head.weight": head * torch.linspace(0.3, 3, len(head))[:, None]}


def chatglm(t: State) -> State:
    """From glm: q, k, v on top of each other, gate_up_proj as it is."""
    out = {"transformer.embedding.word_embeddings.weight": t["model.embed_tokens.weight"]}
    out["transformer.encoder.final_layernorm.weight"] = t["model.norm.weight"]
    out["transformer.output_layer.weight"] = t["lm_head.weight"]
    out["transformer.rotary_pos_emb.inv_freq"] = torch.ones(DIM // 4)
    for n in range(LAYERS):
        a, b = f"model.layers.{n}.", f"transformer.encoder.layers.{n}."
        for kind in ("weight", "bias"):
            parts = [t[a + f"self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[b + f"self_attention.query_key_value.{kind}"] = torch.cat(parts)
        out[b + "self_attention.dense.weight"] = t[a + "self_attn.o_proj.weight"]
        out[b + "mlp.dense_h_to_4h.weight"] = t[a + "mlp.gate_up_proj.weight"]
        out[b + "mlp.dense_4h_to_h.weight"] = t[a + "mlp.down_proj.weight"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[b + f"{name}.weight"] = t[a + f"{name}.weight"]
    return out


def mimo(t: State) -> State:
    """From qwen2, with a layer of multi-token prediction."""
    generator, out = torch.Generator().manual_seed(7), dict(t)
    at, hidden = "model.mtp_layers.0.", 64
    for name in [name for name in t if name.startswith("model.layers.0.")]:
        shape = t[name].shape
        out[name.replace("model.layers.0.", at)] = torch.randn(shape, generator=generator)
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        out[at + name + ".weight"] = torch.randn(hidden, generator=generator)
    out[at + "input_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator)
    return out


def internlm(t: State) -> State:
    """From qwen2 with as many groups as heads: a bias on o as well, which must be zeros."""
    return t | {f"model.layers.{n}.self_attn.o_proj.bias": torch.zeros(64) for n in range(LAYERS)}


# MiniCPM says 0.7 on the residual stream as scale_depth / sqrt(layers), and 4 as hidden size / dim_model_base
MINICPM = {"residual_multiplier": 0.7, "logits_scaling": 4.0, "attention_multiplier": DIM**-0.5}
KIMI = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "rope_theta": 5e4, "num_nextn_predict_layers": 0}
BASE = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": 120}
# family: (twin in configs/tiny, changes to its config, layout, config.json of the family)
CASES: dict[str, tuple[str, dict[str, Any], Callable[[State], State], dict[str, Any]]] = {
    "qwen": ("qwen2", {"num_key_value_heads": HEADS}, qwen, BASE | {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "intermediate_size": 192, "seq_length": 256,
        "kv_channels": DIM, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 1e6, "no_bias": True, "tie_word_embeddings": False,
    }),
    "internlm2": ("llama", {}, internlm2, BASE | {
        "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "intermediate_size": 96, "bias": False,
        "max_position_embeddings": 256, "num_key_value_heads": GROUPS, "rms_norm_eps": 1e-5, "rope_theta": 10000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False,
    }),
    "baichuan": ("llama", {"num_key_value_heads": HEADS}, baichuan, BASE | {
        "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "intermediate_size": 96,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }),
    "baichuan2": ("llama", {"num_key_value_heads": HEADS}, baichuan2, BASE | {
        "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "intermediate_size": 96,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "z_loss_weight": 0,
    }),
    "chatglm": ("glm", {}, chatglm, {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 64, "num_layers": LAYERS,
        "num_attention_heads": HEADS, "kv_channels": DIM, "ffn_hidden_size": 96, "padded_vocab_size": 120, "seq_length": 256,
        "layernorm_epsilon": 1e-6, "multi_query_attention": True, "multi_query_group_num": GROUPS, "rope_ratio": 1,
        "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
    }),
    "minicpm": ("granite", MINICPM, dict, BASE | {
        "model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "intermediate_size": 96,
        "max_position_embeddings": 256, "num_key_value_heads": GROUPS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16,
    }),
    "internlm": ("qwen2", {"num_key_value_heads": HEADS}, internlm, BASE | {
        "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "intermediate_size": 96, "bias": True,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rotary": {"base": 1e6, "type": "origin"},
        "tie_word_embeddings": False,
    }),
    "mimo": ("qwen2", {}, mimo, json.loads((CONFIGS / "mimo.json").read_text())),
    "kimi_k2": ("deepseek_v3", KIMI, dict, json.loads((CONFIGS / "deepseek_v3.json").read_text()) | KIMI | {
        "model_type": "kimi_k2", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    }),
}  # fmt: skip
# what is done to the twin's own weights first
TWINS: dict[str, Callable[[State], State]] = {"baichuan2": normalised_head}
CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(the twin, the same weights as the family stores them)."""
    from shardtool import tiny

    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            twin, changes, layout, config = CASES[family]
            root = tmp_path_factory.mktemp(family)
            model = tiny.build(json.loads((CONFIGS / f"{twin}.json").read_text()) | changes, root / "twin")
            if family in TWINS:
                tensors = TWINS[family](load_file(model / "model.safetensors"))
                save_file(tensors, model / "model.safetensors", {"format": "pt"})
            (root / "model").mkdir()
            tensors = {
                name: value.contiguous() for name, value in layout(load_file(model / "model.safetensors")).items()
            }
            save_file(tensors, root / "model" / "model.safetensors", {"format": "pt"})
            (root / "model" / "config.json").write_text(json.dumps(config))
            made[family] = model, root / "model"
        return made[family]

    return get


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
@pytest.mark.parametrize("family", CASES)
def test_the_conversion_is_the_twin(
    family: str, fmt: str, pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    twin, model = pair(family)
    megatron = convert(model, tmp_path / "megatron", "--format", fmt, "--tp", "2", "--pp", "2")
    level = done("verify", twin, megatron, "--level", "logits", "-q", "--json").json["levels"][0]
    assert level["ratio"] <= 1e-4
    done("megatron2hf", megatron, tmp_path / "back", "--hf", model, "-q")
    ours, theirs = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    ours.pop("transformer.rotary_pos_emb.inv_freq", None)  # computed, not a weight
    assert ours.keys() == theirs.keys()
    if family == "baichuan2":  # the scale of the rows is lost, and only that
        ours = normalised_head(ours)
        head = "lm_head.weight"
        assert torch.allclose(ours.pop(head), theirs[head], rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    if family == "minicpm":  # its factors are in Megatron's weights
        eps = torch.finfo(torch.float32).eps
        assert all(torch.allclose(ours[name], theirs[name], rtol=2 * eps, atol=0) for name in ours)
        return
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


FAULTS: dict[str, Callable[[Path], None]] = {
    # gate and up the wrong way round, as Qwen-1's w1 and w2 suggest
    "qwen": lambda m: edit_tensors(m, "linear_fc1.weight", lambda t: torch.cat(t.chunk(2)[::-1])),
    # wqkv read as all queries, all keys, all values
    "internlm2": lambda m: edit_tensors(
        m, "linear_qkv.weight", lambda t: t.view(2, 4, DIM, -1).transpose(0, 1).reshape(t.shape)
    ),
    "baichuan": lambda m: edit_tensors(
        m, "linear_qkv.weight", lambda t: t.view(-1, 3, DIM, t.shape[-1]).flip(1).reshape(t.shape)
    ),
    # the head as it is stored
    "baichuan2": lambda m: edit_tensors(
        m, "output_layer.weight", lambda t: t * torch.linspace(0.3, 3, len(t))[:, None]
    ),
    "chatglm": lambda m: edit_args(m, rotary_base=50000),
    # the embedding as it is stored
    "minicpm": lambda m: edit_tensors(m, "word_embeddings.weight", lambda t: t / 12),
    "internlm": lambda m: edit_tensors(m, "linear_qkv.bias", torch.zeros_like),
    "mimo": lambda m: edit_tensors(m, "linear_qkv.bias", torch.zeros_like),
    "kimi_k2": lambda m: edit_args(m, moe_router_topk_scaling_factor=2.5),
}


@pytest.mark.parametrize("family", CASES)
def test_a_planted_fault_is_caught(family: str, pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    twin, model = pair(family)
    megatron = convert(model, tmp_path / "megatron", "--format", "torch", "--tp", "2")
    FAULTS[family](megatron)
    assert command("verify", twin, megatron, "--level", "logits", "-q").code == 1


# --- MiMo's multi-token prediction -----------------------------------------------------------------------------------


def mtp_statement(t: State) -> State:
    """The MTP layer's own tensors as megatron-core has them: its projection reads the token first, MiMo's the state."""
    at = "model.mtp_layers.0."
    state, token = t[at + "input_proj.weight"].split(64, dim=1)
    return {
        "enorm.weight": t[at + "token_layernorm.weight"],
        "hnorm.weight": t[at + "hidden_layernorm.weight"],
        "final_layernorm.weight": t[at + "final_layernorm.weight"],
        "eh_proj.weight": torch.cat([token, state], dim=1),
    }


def qkv(t: State, at: str) -> torch.Tensor:
    parts = [t[at + f"self_attn.{x}_proj.weight"].view(GROUPS, -1, DIM, 64) for x in "qkv"]
    return torch.cat(parts, dim=1).reshape(-1, 64)


@pytest.mark.parametrize("name", ["transformer_layer", "mtp_model_layer"])
def test_mimos_multi_token_prediction_in_rank_files(
    name: str, pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, model = pair("mimo")
    t = load_file(model / "model.safetensors")
    layout = ("--format", "torch", "--tp", "2", "--pp", "2", "--mtp-name", name)
    megatron = convert(model, tmp_path / "megatron", *layout)
    wanted, inner = mtp_statement(t), f"mtp.layers.0.{name}."
    at = "model.mtp_layers.0."
    for tp in range(2):
        path = megatron / "release" / f"mp_rank_{tp:02d}_001" / "model_optim_rng.pt"
        found = torch.load(path, weights_only=False)["model"]
        for key in ("enorm.weight", "hnorm.weight", "final_layernorm.weight"):
            assert torch.equal(found[f"mtp.layers.0.{key}"], wanted[key])
        projection = found["mtp.layers.0.eh_proj.weight"]
        assert torch.equal(projection, wanted["eh_proj.weight"].chunk(2)[tp])
        # the fault that this must catch: the halves as MiMo has them
        assert not torch.equal(projection, t[at + "input_proj.weight"].chunk(2)[tp])
        assert torch.equal(found[inner + "self_attention.linear_qkv.weight"], qkv(t, at).chunk(2)[tp])
        gate, up = (t[at + f"mlp.{half}_proj.weight"].chunk(2)[tp] for half in ("gate", "up"))
        assert torch.equal(found[inner + "mlp.linear_fc1.weight"], torch.cat([gate, up]))
        norm = found[inner + "self_attention.linear_qkv.layer_norm_weight"]
        assert torch.equal(norm, t[at + "input_layernorm.weight"])


def test_mimos_multi_token_prediction_in_torch_dist(pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Read by torch itself."""
    _, model = pair("mimo")
    megatron = convert(model, tmp_path / "megatron", "--format", "torch_dist", "--tp", "2", "--pp", "2")
    for key, value in mtp_statement(load_file(model / "model.safetensors")).items():
        found = {f"mtp.layers.0.{key}": torch.empty_like(value)}
        reader = dcp.FileSystemReader(str(megatron / "release"))
        dcp.load(found, storage_reader=reader, no_dist=True)
        assert torch.equal(found[f"mtp.layers.0.{key}"], value), key


def test_without_the_layers_that_its_config_promises(pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Qwen2 under MiMo's name: a fine-tuned model that was saved without multi-token prediction."""
    _, model = pair("mimo")
    (tmp_path / "model").mkdir()
    tensors = load_file(model / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if ".mtp_layers." not in name}
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text((model / "config.json").read_text())
    megatron = convert(tmp_path / "model", tmp_path / "megatron", "--tp", "2")
    done("megatron2hf", megatron, tmp_path / "back", "-q")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()
