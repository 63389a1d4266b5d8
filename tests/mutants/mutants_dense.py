"""Dense models with grouped queries: Llama, Qwen, Mistral."""

from __future__ import annotations

from pathlib import Path

import torch

from catalogue import Mutant
from planting import State, between_ranks, both, exchanged, flipped, in_args, in_state, in_tensors, rank_files, removed

GROUPS, QUERIES, HEAD = 4, 2, 8  # of the tiny models at tp 1: rows of linear_qkv are (g (q d + d + d))
QKV, QKV_BIAS = "linear_qkv.weight", "linear_qkv.bias"
LAYER = "decoder.layers.{}."


def grouped(value: torch.Tensor) -> torch.Tensor:
    """[group, its queries + key + value, head dim, ...]"""
    return value.reshape(-1, QUERIES + 2, HEAD, *value.shape[1:])


def contiguous(value: torch.Tensor) -> torch.Tensor:
    """All queries, all keys, all values, as Hugging Face concatenates them, in place of group by group."""
    rows = grouped(value)
    parts = rows[:, :QUERIES], rows[:, QUERIES], rows[:, QUERIES + 1]
    return torch.cat([part.reshape(-1, *value.shape[1:]) for part in parts])


def groups_permuted(value: torch.Tensor) -> torch.Tensor:
    return grouped(value)[[0, 1, 3, 2]].reshape_as(value)


def query_heads_permuted(value: torch.Tensor) -> torch.Tensor:
    """The two query heads of the last group exchanged."""
    rows = grouped(value).clone()
    rows[3, [0, 1]] = rows[3, [1, 0]]
    return rows.reshape_as(value)


def key_heads_permuted(value: torch.Tensor) -> torch.Tensor:
    """The keys of the first two groups exchanged; queries and values stay."""
    rows = grouped(value).clone()
    rows[[0, 1], QUERIES] = rows[[1, 0], QUERIES]
    return rows.reshape_as(value)


def heads_by_place_in_group(value: torch.Tensor) -> torch.Tensor:
    """Query heads numbered (place in the group, group) in place of (group, place)."""
    rows = grouped(value).clone()
    queries = rows[:, :QUERIES]
    rows[:, :QUERIES] = queries.transpose(0, 1).reshape_as(queries)
    return rows.reshape_as(value)


def keys_and_values_swapped(value: torch.Tensor) -> torch.Tensor:
    rows = grouped(value).clone()
    rows[:, [QUERIES, QUERIES + 1]] = rows[:, [QUERIES + 1, QUERIES]]
    return rows.reshape_as(value)


PAIRS = torch.arange(HEAD).reshape(2, -1).t().flatten()  # 0, 4, 1, 5, ...: the order of interleaved rope


def rope_pairs(value: torch.Tensor) -> torch.Tensor:
    """Rows of queries and keys in the order of Meta's checkpoints."""
    rows = grouped(value).clone()
    rows[:, : QUERIES + 1] = rows[:, : QUERIES + 1][:, :, PAIRS]
    return rows.reshape_as(value)


def rope_pairs_of_keys(value: torch.Tensor) -> torch.Tensor:
    """Keys alone, as a tool leaves them that permutes them with the number of query heads."""
    rows = grouped(value).clone()
    rows[:, QUERIES] = rows[:, QUERIES][:, PAIRS]
    return rows.reshape_as(value)


def keys_permuted_as_queries(value: torch.Tensor) -> torch.Tensor:
    """The permutation of rope rows with the number of query heads in place of key heads."""
    rows = grouped(value).clone()
    keys = rows[:, QUERIES].reshape(GROUPS * HEAD, *value.shape[1:])
    heads = GROUPS * QUERIES
    keys = keys.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape_as(keys)
    rows[:, QUERIES] = keys.reshape(GROUPS, HEAD, *value.shape[1:])
    return rows.reshape_as(value)


def halves_swapped(value: torch.Tensor) -> torch.Tensor:
    return torch.cat(value.chunk(2)[::-1])


def halves_in_turn(value: torch.Tensor) -> torch.Tensor:
    return torch.stack(value.chunk(2), dim=1).flatten(0, 1)


def gate_and_up_cut_as_one(checkpoint: Path) -> None:
    """[gate; up] cut into equal blocks over tp 2: rank 0 has all of gate, rank 1 all of up."""
    with rank_files(checkpoint) as files:
        for name in [name for name in files[0,]["model"] if name.endswith("linear_fc1.weight")]:
            held = [files[tp,]["model"][name].chunk(2) for tp in (0, 1)]
            for part, tp in enumerate((0, 1)):
                files[tp,]["model"][name] = torch.cat([held[0][part], held[1][part]])


def layers_exchanged(state: State) -> None:
    for name in list(state):
        if name.startswith("decoder.layers.1.") and isinstance(state[name], torch.Tensor):
            mate = name.replace("layers.1.", "layers.2.")
            state[name], state[mate] = state[mate].clone(), state[name].clone()


def last_layer_lost(state: State) -> None:
    """A layer's place holds the one before it, as an uneven split that drops a layer and repeats another leaves it."""
    for name in list(state):
        if name.startswith("decoder.layers.3.") and isinstance(state[name], torch.Tensor):
            state[name] = state[name.replace("layers.3.", "layers.2.")].clone()


def final_norm_of_a_layer(state: State) -> None:
    if "decoder.final_layernorm.weight" in state:
        state["decoder.final_layernorm.weight"] = state["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"].clone()


def rows_shifted(name: str):
    """The last 8 vocabulary rows one further, as padding in the wrong place would have them."""

    def change(state: State) -> None:
        if name in state:
            state[name][112:120] = state[name][111:119].clone()

    return change


def head_is_another(state: State) -> None:
    """The copy of the tied embedding on the last stage holds something else."""
    if "output_layer.weight" in state:
        state["output_layer.weight"] = state["output_layer.weight"].flip(1).contiguous()


def tp_files_exchanged(checkpoint: Path) -> None:
    with rank_files(checkpoint) as files:
        one, other = files[0,]["model"], files[1,]["model"]
        files[0,]["model"], files[1,]["model"] = other, one


def stages_exchanged(checkpoint: Path) -> None:
    between_ranks(lambda name: name.startswith("decoder.layers."), (0, 0), (0, 1))(checkpoint)


def chunks_exchanged(checkpoint: Path) -> None:
    """The layers of the two model chunks of each stage, as a loop over stages before chunks numbers them."""
    with rank_files(checkpoint) as files:
        for content in files.values():
            one, other = content["model0"], content["model1"]
            for name in [name for name in one if name.startswith("decoder.layers.")]:
                one[name], other[name] = other[name], one[name]


def chunks_numbered_by_stage(checkpoint: Path) -> None:
    """Layers dealt out stage by stage where megatron-core deals them chunk by chunk (pp 2, vpp 2)."""
    with rank_files(checkpoint) as files:
        one, other = files[0, 0]["model1"], files[0, 1]["model0"]
        for name in [name for name in one if name.startswith("decoder.layers.")]:
            one[name], other[name] = other[name], one[name]


def norms_of_one_rank(checkpoint: Path) -> None:
    """A norm that is not the same on both tensor parallel ranks."""
    with rank_files(checkpoint) as files:
        name = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
        files[1,]["model"][name] = files[1,]["model"][name] * 1.5


def not_a_number(value: torch.Tensor) -> torch.Tensor:
    result = value.clone()
    result[0, 0] = float("nan")
    return result


def cast(value: torch.Tensor) -> torch.Tensor:
    return value.bfloat16().float() if value.is_floating_point() else value


L1, L2 = LAYER.format(1) + "self_attention.", LAYER.format(2) + "self_attention."
TP2, PP2, VPP = ("--tp", 2), ("--pp", 2), ("--pp", 2, "--vpp", 2)

# fmt: off
MUTANTS = tuple(Mutant(name, "dense GQA", model, plant, options, **more) for name, model, options, plant, more in [
    ("q, k, v one after the other, not group by group", "llama", (), in_tensors(QKV, contiguous), {"diff": "qkv_order", "seen": "PAI #723, InternLM2 scripts"}),
    ("q, k, v one after the other on each of two ranks", "llama", TP2, in_tensors(QKV, contiguous), {"diff": "qkv_order", "seen": "epfLLM #63"}),
    ("query groups exchanged in one layer", "llama", (), in_tensors(L1 + QKV, groups_permuted), {"diff": "query_groups_exchanged"}),
    ("two query heads exchanged in one layer", "llama", (), in_tensors(L1 + QKV, query_heads_permuted), {"diff": "query_heads_exchanged"}),
    ("query heads numbered by place in the group", "llama", (), in_tensors(QKV, heads_by_place_in_group), {"diff": "query_heads_interleaved"}),
    ("keys of two groups exchanged in one layer", "llama", (), in_tensors(L1 + QKV, key_heads_permuted), {"diff": "query_groups_exchanged"}),
    ("keys and values swapped", "llama", (), in_tensors(QKV, keys_and_values_swapped), {"diff": "key_value_swapped"}),
    ("rope rows as pairs, not as halves", "llama", (), in_tensors(QKV, rope_pairs), {"diff": "rope_interleaved", "seen": "torchtitan #1291"}),
    ("rope rows of the keys alone as pairs", "llama", (), in_tensors(QKV, rope_pairs_of_keys), {"diff": "rope_interleaved"}),
    ("keys permuted with the number of query heads", "llama", (), in_tensors(QKV, keys_permuted_as_queries), {"seen": "llama.cpp #3364"}),
    ("gate and up swapped", "llama", (), in_tensors("linear_fc1.weight", halves_swapped), {"diff": "gate_up_swapped", "seen": "Qwen-1 scripts"}),
    ("gate and up rows in turn", "llama", (), in_tensors("linear_fc1.weight", halves_in_turn), {"diff": "gate_up_interleaved"}),
    ("[gate; up] cut over tp as one matrix", "llama", TP2, gate_and_up_cut_as_one, {"diff": "gate_up_order", "seen": "SwiGLU checkpoints split by rows"}),
    ("one output projection transposed", "llama", (), in_tensors(L2 + "linear_proj.weight", torch.t), {"diff": "transposed"}),
    ("one MLP projection transposed", "llama", (), in_tensors(LAYER.format(2) + "mlp.linear_fc2.weight", torch.t), {"diff": "transposed"}),
    ("two layers exchanged", "llama", (), in_state(layers_exchanged), {"diff": "layers_exchanged"}),
    ("a layer lost, another there twice", "llama", (), in_state(last_layer_lost), {"diff": "moved", "seen": "MLM #1304, FlagScale #396"}),
    ("norms of two layers exchanged", "llama", (), exchanged("layers.0.mlp.linear_fc1.layer_norm", "layers.3.mlp.linear_fc1.layer_norm"), {"diff": "layers_exchanged"}),
    ("the final norm is a layer's", "llama", PP2, in_state(final_norm_of_a_layer), {"diff": "moved"}),
    ("last rows of the head shifted by one", "llama", (), in_state(rows_shifted("output_layer.weight")), {"diff": "vocabulary_rows_shifted"}),
    ("last rows of the embedding shifted by one", "llama", (), in_state(rows_shifted("embedding.word_embeddings.weight")), {"diff": "vocabulary_rows_shifted"}),
    ("tp shards of the output projections exchanged", "llama", TP2, between_ranks(lambda name: name.endswith("linear_proj.weight"), (0,), (1,)), {"diff": "tp_shards_exchanged"}),
    ("tp rank files exchanged", "llama", TP2, tp_files_exchanged, {"diff": "tp_shards_exchanged"}),
    ("pipeline stages exchanged", "llama", PP2, stages_exchanged, {"diff": "model_chunks_exchanged"}),
    ("model chunks of each stage exchanged (vpp)", "llama", VPP, chunks_exchanged, {"diff": "model_chunks_exchanged", "seen": "MLM #1212"}),
    ("layers dealt out by stage, not by model chunk (vpp)", "llama", VPP, chunks_numbered_by_stage, {"diff": "model_chunks_exchanged"}),
    ("a norm that differs between tp ranks", "llama", TP2, norms_of_one_rank, {"diff": "copies"}),
    ("one layer's query, key and value biases zeroed", "qwen2", (), in_tensors(L2 + QKV_BIAS, torch.zeros_like), {"diff": "zeroed", "seen": "mlc-llm #3494"}),
    ("one bias tensor missing", "qwen2", (), removed(L2 + QKV_BIAS), {"diff": "missing"}),
    ("all biases dropped, and the flag with them", "qwen2", (), both(removed(QKV_BIAS), in_args(add_qkv_bias=False)), {"diff": "missing", "seen": "mlc-llm #3494"}),
    ("biases one after the other, weights group by group", "qwen2", (), in_tensors(QKV_BIAS, contiguous), {"diff": "qkv_order"}),
    ("the copy of a tied head is another", "qwen2_tied", PP2, in_state(head_is_another), {"diff": "copies", "seen": "slime #345"}),
    ("query and key norms exchanged", "qwen3", (), exchanged("q_layernorm", "k_layernorm"), {"diff": "moved"}),
    ("query and key norms dropped", "qwen3", (), both(removed("q_layernorm.weight"), removed("k_layernorm.weight"), in_args(qk_layernorm=False)), {"diff": "missing"}),
    ("one weight matrix rounded to bf16", "llama", (), in_tensors(L1 + QKV, cast), {"diff": "rounded"}),
    ("all weights rounded to bf16 in an fp32 checkpoint", "llama", (), in_tensors("", cast), {"diff": "rounded"}),
    ("one weight is NaN", "llama", (), in_tensors(L1 + QKV, not_a_number), {"diff": "not_finite"}),
    ("one flipped bit, of the exponent, in one weight", "llama", (), in_tensors(LAYER.format(2) + "mlp.linear_fc2.weight", flipped(24)), {"diff": "one_element"}),
    ("one flipped bit, the last of the mantissa", "llama", (), in_tensors(LAYER.format(2) + "mlp.linear_fc2.weight", flipped(0)), {"diff": "one_element", "silent": True}),
    ("one matrix scaled by 1.01", "llama", (), in_tensors(L2 + "linear_proj.weight", lambda value: value * 1.01), {"diff": "scaled"}),
    ("the head's rows normalised", "llama", (), in_tensors("output_layer.weight", lambda value: value / value.norm(dim=1, keepdim=True).clamp_min(1e-9)), {"seen": "NormHead of Baichuan 2, applied or forgotten"}),
    ("norm weights minus one", "llama", (), in_tensors("layer_norm_weight", lambda value: value - 1), {"diff": "off_by_one", "seen": "Gemma and Nemotron: gamma without +1"}),
    ("rope base 1e4 for 1e6", "qwen2", (), in_args(rotary_base=10000), {"seen": "MB #3077"}),
    ("epsilon 1e-5 for 1e-6", "qwen2", (), in_args(norm_epsilon=1e-5), {}),
    ("epsilon 1e-6 for 1e-5", "llama", (), in_args(norm_epsilon=1e-6), {}),
    ("llama3 rope scaling dropped", "llama3", (), in_args(use_rope_scaling=False), {"seen": "MB #3077, swiss-ai #76"}),
    ("llama3 rope factor 32 for 8", "llama3", (), in_args(rope_scaling_factor=32.0), {"seen": "swiss-ai #80"}),
    ("linear rope scaling dropped", "llama_linear", (), in_args(rotary_seq_len_interpolation_factor=None), {"seen": "MB #5097"}),
    ("rope over a half of each head", "llama", (), in_args(rotary_percent=0.5), {}),
    ("interleaved rope", "llama", (), in_args(rotary_interleaved=True), {}),
    ("attention window ignored", "mistral", (), in_args(window_size=None), {}),
    ("attention window one too long", "mistral", (), in_args(window_size=(8, 0)), {"seen": "MB 5fcab34f8, mcore-bridge"}),
    ("attention window one too short", "mistral", (), in_args(window_size=(6, 0)), {}),
    ("layers without positions have them", "smollm3", (), in_args(no_rope_freq=None), {}),
    ("gelu for silu", "llama", (), in_args(swiglu=False, bias_gelu_fusion=True), {}),
    ("query groups 8 for 4", "llama", (), in_args(num_query_groups=8), {}),
    ("LayerNorm for RMSNorm", "llama", (), in_args(normalization="LayerNorm"), {}),
])
