"""Qwen-1, Baichuan, InternLM2 and ChatGLM once more, in plain torch, from the description of each model's own code.

They share nothing with shardtool: weights are made here under the family's own names, and the forward pass reads them
under these names. Functions return logits [batch, token, vocabulary] in the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize, silu

State = dict[str, Tensor]
Config = dict[str, Any]
LAYERS, HIDDEN, HEADS, GROUPS, DIM, FFN, VOCAB = 2, 32, 4, 2, 8, 48, 80
ENDS = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "tie_word_embeddings": False}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [batch, token, head, dim]; several query heads share a key head in order."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(mask, float("-inf")).float().softmax(-1).to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def angles(tokens: int, dims: int, base: float) -> Tensor:
    """[token, pair] in radians."""
    return torch.outer(torch.arange(tokens).float(), 1.0 / base ** (torch.arange(0, dims, 2).float() / dims))


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Dim i and dim i + d/2 are a pair."""
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Dim 2i and dim 2i + 1 are a pair, in the first dims; the others stay."""
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    turned, rest = x[..., : 2 * angle.shape[1]], x[..., 2 * angle.shape[1] :]
    a, b = turned[..., 0::2], turned[..., 1::2]
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2), rest], -1)


# --- Qwen-1 ----------------------------------------------------------------------------------------------------------

QWEN = ENDS | {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": VOCAB, "intermediate_size": 2 * FFN,
    "seq_length": 64, "kv_channels": DIM, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 1e6, "rotary_pct": 1.0,
    "no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True, "scale_attn_weights": True,
}  # fmt: skip


def qwen_shapes(_: Config) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for n in range(LAYERS):
        at = f"transformer.h.{n}."
        found |= {at + "ln_1.weight": (HIDDEN,), at + "ln_2.weight": (HIDDEN,)}
        found |= {at + "attn.c_attn.weight": (3 * HIDDEN, HIDDEN), at + "attn.c_attn.bias": (3 * HIDDEN,)}
        found |= {at + "attn.c_proj.weight": (HIDDEN, HIDDEN), at + "mlp.c_proj.weight": (HIDDEN, FFN)}
        found |= {at + "mlp.w1.weight": (FFN, HIDDEN), at + "mlp.w2.weight": (FFN, HIDDEN)}
    return found | {"transformer.ln_f.weight": (HIDDEN,)}


def qwen(t: State, c: Config, ids: Tensor) -> Tensor:
    """Within seq_length. `c_attn` gives q, k and v for all heads; the MLP is c_proj(w1(x) * silu(w2(x)))."""
    x, eps = t["transformer.wte.weight"][ids], c["layer_norm_epsilon"]
    angle = angles(ids.shape[1], DIM, c["rotary_emb_base"])
    for n in range(LAYERS):
        at = f"transformer.h.{n}."
        mixed = linear(rms(x, t[at + "ln_1.weight"], eps), t[at + "attn.c_attn.weight"], t[at + "attn.c_attn.bias"])
        q, k, v = (part.unflatten(-1, (HEADS, DIM)) for part in mixed.split(HIDDEN, -1))
        q, k = rotate_halves(q, angle), rotate_halves(k, angle)
        x = x + linear(causal(q, k, v), t[at + "attn.c_proj.weight"])
        y = rms(x, t[at + "ln_2.weight"], eps)
        y = linear(y, t[at + "mlp.w1.weight"]) * silu(linear(y, t[at + "mlp.w2.weight"]))
        x = x + linear(y, t[at + "mlp.c_proj.weight"])
    return linear(rms(x, t["transformer.ln_f.weight"], eps), t["lm_head.weight"])


# --- Baichuan 1 and 2, 7B --------------------------------------------------------------------------------------------

BAICHUAN = ENDS | {
    "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "vocab_size": VOCAB, "intermediate_size": FFN,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
BAICHUAN2 = BAICHUAN | {"z_loss_weight": 0}


def baichuan_shapes(_: Config) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        found |= {at + "input_layernorm.weight": (HIDDEN,), at + "post_attention_layernorm.weight": (HIDDEN,)}
        found |= {
            at + "self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        }
        found |= {at + "mlp.gate_proj.weight": (FFN, HIDDEN), at + "mlp.up_proj.weight": (FFN, HIDDEN)}
        found |= {at + "mlp.down_proj.weight": (HIDDEN, FFN)}
    return found | {"model.norm.weight": (HIDDEN,)}


def baichuan(t: State, c: Config, ids: Tensor) -> Tensor:
    """`W_pack` is q, k and v on top of each other. Baichuan 2 divides each row of the head by its norm."""
    x, eps = t["model.embed_tokens.weight"][ids], c["rms_norm_eps"]
    angle = angles(ids.shape[1], DIM, 10000.0)
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        packed = linear(rms(x, t[at + "input_layernorm.weight"], eps), t[at + "self_attn.W_pack.weight"])
        q, k, v = (part.unflatten(-1, (HEADS, DIM)) for part in packed.unflatten(-1, (3, HIDDEN)).unbind(-2))
        q, k = rotate_halves(q, angle), rotate_halves(k, angle)
        x = x + linear(causal(q, k, v), t[at + "self_attn.o_proj.weight"])
        y = rms(x, t[at + "post_attention_layernorm.weight"], eps)
        y = silu(linear(y, t[at + "mlp.gate_proj.weight"])) * linear(y, t[at + "mlp.up_proj.weight"])
        x = x + linear(y, t[at + "mlp.down_proj.weight"])
    head = t["lm_head.weight"]
    return linear(rms(x, t["model.norm.weight"], eps), normalize(head) if "z_loss_weight" in c else head)


# --- InternLM2 -------------------------------------------------------------------------------------------------------

INTERNLM2 = ENDS | {
    "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "vocab_size": VOCAB, "intermediate_size": FFN,
    "num_key_value_heads": GROUPS, "bias": False, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
}  # fmt: skip


def internlm2_shapes(_: Config) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (VOCAB, HIDDEN),
        "output.weight": (VOCAB, HIDDEN),
    }
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        found |= {at + "attention_norm.weight": (HIDDEN,), at + "ffn_norm.weight": (HIDDEN,)}
        found |= {at + "attention.wqkv.weight": ((HEADS + 2 * GROUPS) * DIM, HIDDEN)}
        found |= {at + "attention.wo.weight": (HIDDEN, HEADS * DIM), at + "feed_forward.w2.weight": (HIDDEN, FFN)}
        found |= {at + "feed_forward.w1.weight": (FFN, HIDDEN), at + "feed_forward.w3.weight": (FFN, HIDDEN)}
    return found | {"model.norm.weight": (HIDDEN,)}


def internlm2(t: State, c: Config, ids: Tensor) -> Tensor:
    """`wqkv` is, for each key head, its query heads, the key, the value. The MLP is w2(silu(w1(x)) * w3(x))."""
    x, eps = t["model.tok_embeddings.weight"][ids], c["rms_norm_eps"]
    angle = angles(ids.shape[1], DIM, c["rope_theta"])
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        mixed = linear(rms(x, t[at + "attention_norm.weight"], eps), t[at + "attention.wqkv.weight"])
        heads = mixed.unflatten(-1, (GROUPS, HEADS // GROUPS + 2, DIM))
        q, k, v = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
        q, k = rotate_halves(q, angle), rotate_halves(k, angle)
        x = x + linear(causal(q, k, v), t[at + "attention.wo.weight"])
        y = rms(x, t[at + "ffn_norm.weight"], eps)
        y = silu(linear(y, t[at + "feed_forward.w1.weight"])) * linear(y, t[at + "feed_forward.w3.weight"])
        x = x + linear(y, t[at + "feed_forward.w2.weight"])
    return linear(rms(x, t["model.norm.weight"], eps), t["output.weight"])


# --- ChatGLM2 and 3 --------------------------------------------------------------------------------------------------

CHATGLM = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "num_layers": LAYERS, "hidden_size": HIDDEN,
    "num_attention_heads": HEADS, "kv_channels": DIM, "ffn_hidden_size": FFN, "padded_vocab_size": VOCAB,
    "seq_length": 64, "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": GROUPS,
    "rope_ratio": 50, "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
    "tie_word_embeddings": False,
}  # fmt: skip


def chatglm_shapes(_: Config) -> dict[str, tuple[int, ...]]:
    rows = (HEADS + 2 * GROUPS) * DIM
    found: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN)}
    for n in range(LAYERS):
        at = f"transformer.encoder.layers.{n}."
        found |= {at + "input_layernorm.weight": (HIDDEN,), at + "post_attention_layernorm.weight": (HIDDEN,)}
        found |= {at + "self_attention.query_key_value.weight": (rows, HIDDEN)}
        found |= {at + "self_attention.query_key_value.bias": (rows,)}
        found |= {at + "self_attention.dense.weight": (HIDDEN, HEADS * DIM)}
        found |= {at + "mlp.dense_h_to_4h.weight": (2 * FFN, HIDDEN), at + "mlp.dense_4h_to_h.weight": (HIDDEN, FFN)}
    found |= {
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (VOCAB, HIDDEN),
    }
    return found


def chatglm(t: State, c: Config, ids: Tensor) -> Tensor:
    """All queries, all keys, all values; neighbouring dims of each head's first half rotate; silu(first) * second."""
    x, eps = t["transformer.embedding.word_embeddings.weight"][ids], c["layernorm_epsilon"]
    angle = angles(ids.shape[1], DIM // 2, 10000.0 * c["rope_ratio"])
    for n in range(LAYERS):
        at = f"transformer.encoder.layers.{n}."
        qkv = at + "self_attention.query_key_value."
        mixed = linear(rms(x, t[at + "input_layernorm.weight"], eps), t[qkv + "weight"], t[qkv + "bias"])
        q, k, v = (p.unflatten(-1, (-1, DIM)) for p in mixed.split([HEADS * DIM, GROUPS * DIM, GROUPS * DIM], -1))
        q, k = rotate_neighbours(q, angle), rotate_neighbours(k, angle)
        x = x + linear(causal(q, k, v), t[at + "self_attention.dense.weight"])
        y = rms(x, t[at + "post_attention_layernorm.weight"], eps)
        gate, up = linear(y, t[at + "mlp.dense_h_to_4h.weight"]).chunk(2, -1)
        x = x + linear(silu(gate) * up, t[at + "mlp.dense_4h_to_h.weight"])
    return linear(rms(x, t["transformer.encoder.final_layernorm.weight"], eps), t["transformer.output_layer.weight"])


# --- InternLM 1 ------------------------------------------------------------------------------------------------------

INTERNLM = ENDS | {
    "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "vocab_size": VOCAB, "intermediate_size": FFN,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "bias": True, "rotary": {"base": 5000, "type": "dynamic"},
}  # fmt: skip


def internlm_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    found = {name: shape for name, shape in baichuan_shapes(c).items() if "W_pack" not in name}
    for n in range(LAYERS):
        for name in "qkvo":
            at = f"model.layers.{n}.self_attn.{name}_proj."
            found |= {at + "weight": (HIDDEN, HIDDEN), at + "bias": (HIDDEN,)}
    return found


def internlm(t: State, c: Config, ids: Tensor) -> Tensor:
    """Within max_position_embeddings. q, k, v and o have biases, the MLP has none."""
    x, eps = t["model.embed_tokens.weight"][ids], c["rms_norm_eps"]
    angle = angles(ids.shape[1], DIM, c["rotary"]["base"])
    for n in range(LAYERS):
        at = f"model.layers.{n}."

        def project(name: str, value: Tensor, at: str = at) -> Tensor:
            return linear(value, t[f"{at}self_attn.{name}_proj.weight"], t[f"{at}self_attn.{name}_proj.bias"])

        y = rms(x, t[at + "input_layernorm.weight"], eps)
        q, k, v = (project(name, y).unflatten(-1, (HEADS, DIM)) for name in "qkv")
        x = x + project("o", causal(rotate_halves(q, angle), rotate_halves(k, angle), v))
        y = rms(x, t[at + "post_attention_layernorm.weight"], eps)
        y = silu(linear(y, t[at + "mlp.gate_proj.weight"])) * linear(y, t[at + "mlp.up_proj.weight"])
        x = x + linear(y, t[at + "mlp.down_proj.weight"])
    return linear(rms(x, t["model.norm.weight"], eps), t["lm_head.weight"])


# --- MiniCPM ---------------------------------------------------------------------------------------------------------

MINICPM = ENDS | {
    "model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "vocab_size": VOCAB, "intermediate_size": FFN,
    "num_key_value_heads": GROUPS, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "scale_emb": 12,
    "scale_depth": 1.4, "dim_model_base": 16, "tie_word_embeddings": True,
}  # fmt: skip


def minicpm_shapes(_: Config) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        found |= {at + "input_layernorm.weight": (HIDDEN,), at + "post_attention_layernorm.weight": (HIDDEN,)}
        for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            found[at + f"self_attn.{name}_proj.weight"] = (heads * DIM, HIDDEN)
        found |= {at + "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM), at + "mlp.down_proj.weight": (HIDDEN, FFN)}
        found |= {at + "mlp.gate_proj.weight": (FFN, HIDDEN), at + "mlp.up_proj.weight": (FFN, HIDDEN)}
    return found | {"model.norm.weight": (HIDDEN,)}


def minicpm(t: State, c: Config, ids: Tensor) -> Tensor:
    """Embeddings times scale_emb, branches times scale_depth / sqrt(layers), the head's input over hidden / base."""
    table, eps = t["model.embed_tokens.weight"], c["rms_norm_eps"]
    x, branch = table[ids] * c["scale_emb"], c["scale_depth"] / LAYERS**0.5
    angle = angles(ids.shape[1], DIM, 10000.0)
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        y = rms(x, t[at + "input_layernorm.weight"], eps)
        q, k, v = (linear(y, t[at + f"self_attn.{name}_proj.weight"]).unflatten(-1, (-1, DIM)) for name in "qkv")
        q, k = rotate_halves(q, angle), rotate_halves(k, angle)
        x = x + linear(causal(q, k, v), t[at + "self_attn.o_proj.weight"]) * branch
        y = rms(x, t[at + "post_attention_layernorm.weight"], eps)
        y = silu(linear(y, t[at + "mlp.gate_proj.weight"])) * linear(y, t[at + "mlp.up_proj.weight"])
        x = x + linear(y, t[at + "mlp.down_proj.weight"]) * branch
    return linear(rms(x, t["model.norm.weight"], eps) / (HIDDEN / c["dim_model_base"]), table)


Forward = Callable[[State, Config, Tensor], Tensor]
Shapes = Callable[[Config], dict[str, tuple[int, ...]]]
ORIGINALS: dict[str, tuple[Config, Shapes, Forward]] = {
    "qwen": (QWEN, qwen_shapes, qwen),
    "baichuan": (BAICHUAN, baichuan_shapes, baichuan),
    "baichuan 2": (BAICHUAN2, baichuan_shapes, baichuan),
    "internlm2": (INTERNLM2, internlm2_shapes, internlm2),
    "chatglm": (CHATGLM, chatglm_shapes, chatglm),
    "internlm": (INTERNLM, internlm_shapes, internlm),
    "minicpm": (MINICPM, minicpm_shapes, minicpm),
}


def weights(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> State:
    """Wide random weights; norms are around one, and nothing is zero."""
    made = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=made) * (0.2 if len(shape) == 1 else 0.15)
        state[name] = (values + (len(shape) == 1 and not name.endswith("bias"))).to(dtype)
    return state
