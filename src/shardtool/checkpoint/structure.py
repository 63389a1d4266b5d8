"""What the tensors of a Megatron checkpoint say of the model's structure, whatever its args say.

Some args say too little (Megatron-LM reads latent attention's sizes and the norms from the command line only) or are
those of another run. Resharding needs the structure alone, so there the tensors decide. What no tensor shows, such as
how a router chooses or what rope does, is left as the args have it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec.structs import replace

from shardtool.checkpoint.megatron import Megatron
from shardtool.families.architecture import Architecture, LatentAttention, MixtureOfExperts
from shardtool.layout.chunks import per_layer_keys

Shapes = Mapping[str, tuple[int, ...]]

ATTENTION = "self_attention."
QKV, PROJ = ATTENTION + "linear_qkv", ATTENTION + "linear_proj"
KV_DOWN, KV_UP = ATTENTION + "linear_kv_down_proj.weight", ATTENTION + "linear_kv_up_proj.weight"
Q_UP, Q_PROJ = ATTENTION + "linear_q_up_proj.weight", ATTENTION + "linear_q_proj.weight"
FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
EXPERT_FC1, EXPERT_FC2 = "mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight"
SHARED_FC2, ROUTER = "mlp.shared_experts.linear_fc2.weight", "mlp.router.weight"


def structure(source: Megatron) -> Architecture:
    """The architecture of the args, with what the tensors show put in its place.

    That is: latent attention and its sizes, the layers with experts, their number and sizes, the shared expert and its
    gate, expert bias, the size and gating of dense MLPs, biases, the kind of norm, qk norms, sinks, and the number of
    multi-token-prediction layers. A layer without any known tensor leaves all as it is: the accounting will name it.
    """
    a = source.architecture
    layers = _layers(source)
    if not all(layers):
        return a
    dense_tp, expert_tp = (source.mesh.tp, source.mesh.expert_tp) if source.format == "torch" else (1, 1)
    a = _attention(a, next((layer for layer in layers if QKV + ".weight" in layer), layers[0]), dense_tp)
    a = replace(a, moe=_moe(a, layers, dense_tp, expert_tp), mtp_layers=_mtp_layers(source))
    norm_biases = (QKV + ".layer_norm_bias", "input_layernorm.bias")
    a = replace(a, norm="layer" if any(name in layers[0] for name in norm_biases) else "rms")
    dense = next((layer for layer in layers if FC1 in layer and FC2 in layer), None)
    if dense is not None:
        return replace(a, ffn_size=dense[FC2][-1] * dense_tp, gated=dense[FC1][0] == 2 * dense[FC2][-1])
    experts = next((layer for layer in layers if EXPERT_FC1 in layer and EXPERT_FC2 in layer), None)
    return a if experts is None else replace(a, gated=experts[EXPERT_FC1][-2] == 2 * experts[EXPERT_FC2][-1])


def _layers(source: Megatron) -> list[Shapes]:
    """The shapes of each layer's tensors as one rank has them, by their names in the layer.

    All experts count as one tensor, whose last two dims are an expert's.
    """
    layers: list[dict[str, tuple[int, ...]]] = [{} for _ in range(source.architecture.num_layers)]
    if source.format == "torch":
        places = {file: place for place, file in source.files.items()}
        first = {pp: min(place for place in source.files if place[1] == pp) for _, pp, _ in source.files}
        held = {(chunk.pp, chunk.vpp): chunk.layers for chunk in source.chunks}
        for (file, name, (number,)), header in source.headers.items():
            pp = places[file][1]
            if (match := re.match(r"decoder\.layers\.(\d+)\.", name)) and places[file] == first[pp]:
                key, shape = _plain(name[match.end() :], header.shape)
                layers[held[pp, number][int(match[1])]][key] = shape
        return list(layers)
    stacked = not per_layer_keys(source.global_shapes)
    for name, shape in source.global_shapes.items():
        if match := re.match(r"decoder\.layers\.(?:(\d+)\.)?", name):
            key, one = _plain(name[match.end() :], shape[1:] if stacked else shape)
            for layer in range(len(layers)) if stacked else [int(match[1] or 0)]:
                if layer < len(layers):
                    layers[layer][key] = one
    return list(layers)


def _plain(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A name without what tells experts apart, and the shape as the linears of experts have it, rows before columns."""
    if match := re.fullmatch(r"mlp\.experts\.weight([12])", name):
        return f"mlp.experts.linear_fc{match[1]}.weight", (*shape[:-2], *reversed(shape[-2:]))
    name = re.sub(r"^mlp\.experts\.(local_experts\.\d+\.|experts\.)", "mlp.experts.", name)
    return re.sub(r"^(mlp\.experts\.linear_fc[12]\.(weight|bias))\d+$", r"\1", name), shape


def _attention(a: Architecture, layer: Shapes, tp: int) -> Architecture:
    if KV_DOWN in layer and KV_UP in layer:
        mla = _latent(a, layer, tp)
        norms = (ATTENTION + "linear_kv_up_proj.layer_norm_weight", ATTENTION + "kv_layernorm.weight")
        return a if mla is None else replace(a, mla=mla, qk_norm=any(name in layer for name in norms))
    if QKV + ".weight" not in layer:
        return a
    linear_bias = PROJ + ".bias" in layer
    return replace(
        a,
        mla=None,
        qk_norm=ATTENTION + "q_layernorm.weight" in layer,
        qk_norm_whole=layer.get(ATTENTION + "q_layernorm.weight", (a.head_dim,)) != (a.head_dim,),
        sinks=ATTENTION + "core_attention.softmax_offset" in layer,
        linear_bias=linear_bias,
        qkv_bias=QKV + ".bias" in layer and not linear_bias,
    )


def _latent(a: Architecture, layer: Shapes, tp: int) -> LatentAttention | None:
    """The sizes of latent attention; None where the tensors' do not fit together with the number of heads."""
    query = layer.get(Q_UP, layer.get(Q_PROJ))
    if query is None:
        return None
    rank, rows = layer[KV_UP][1], layer[KV_DOWN][0]
    rows = (
        rows if rows > rank else rows * tp
    )  # a part of them, as the local spec has it and Transformer Engine's to 0.13
    rope = rows - rank
    query_dim, query_rest = divmod(query[0] * tp, a.num_heads)
    both, both_rest = divmod(layer[KV_UP][0] * tp, a.num_heads)
    value, value_rest = divmod(layer.get(PROJ + ".weight", (0, 0))[1] * tp, a.num_heads)
    nope = query_dim - rope
    if query_rest or both_rest or value_rest or min(rope, nope, value) < 1 or nope + value != both:
        return None
    query_norm = ATTENTION + "linear_q_proj.layer_norm_weight" in layer
    return LatentAttention(query[1] if Q_UP in layer else None, rank, nope, rope, value, query_norm)


def _moe(a: Architecture, layers: list[Shapes], tp: int, expert_tp: int) -> MixtureOfExperts | None:
    held = tuple(number for number, layer in enumerate(layers) if ROUTER in layer)
    if not held:
        return None
    one = layers[held[0]]
    moe = a.moe or MixtureOfExperts(num_experts=0, top_k=1, ffn_size=0, layers=())
    return replace(
        moe,
        num_experts=one[ROUTER][0],
        layers=held,
        ffn_size=one[EXPERT_FC2][-1] * expert_tp if EXPERT_FC2 in one else moe.ffn_size,
        expert_bias="mlp.router.expert_bias" in one,
        shared_ffn_size=one[SHARED_FC2][-1] * tp if SHARED_FC2 in one else 0,
        shared_gate="mlp.shared_experts.gate_weight" in one,
    )


def _mtp_layers(source: Megatron) -> int:
    found = (re.match(r"mtp\.layers\.(\d+)\.", key[1]) for key in source.headers)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
