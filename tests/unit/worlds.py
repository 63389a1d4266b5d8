"""Small random models in plain numpy, as every format must hold them: what the plan is judged by.

`Truth` states the rules of Hugging Face and of Megatron with reshapes, slices and concatenations. It uses nothing of
the equations, the views or the layouts; only names and keys are common ground.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st
from msgspec.structs import replace

from shardtool.errors import UsageError
from shardtool.families.architecture import Architecture, LatentAttention, MixtureOfExperts, Rope
from shardtool.families.blocks import axis_sizes, standard
from shardtool.families.registry import FAMILIES
from shardtool.layout.chunks import chunked_layout
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import Key, Layout, Piece
from shardtool.layout.megatron import Spelling, dist_layout, legacy_layout, rank_grid
from shardtool.layout.mesh import Chunk, Mesh, chunks
from shardtool.layout.rules import Rule
from shardtool.plan.copies import Plan

Arrays = dict[Key, Any]  # numpy arrays by key
Box = tuple[tuple[int, ...], tuple[int, ...]]
PADDING = -7  # what stands in a source's padding rows: it must not arrive anywhere


@dataclass(frozen=True)
class Truth:
    """A model with a number of its own for every element."""

    a: Architecture

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules under test."""
        return FAMILIES["gpt2"].rules(self.a) if self.a.family == "gpt2" else standard(self.a)

    @cached_property
    def weights(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The logical weights: those that exist once, and those of each layer (MTP layers last).

        q, k and v are [group, (head,) dim, hidden]; those of an expert are lists.
        """
        count = 1

        def number(shape: tuple[int, ...]) -> Any:
            nonlocal count
            count += prod(shape)
            return np.arange(count - prod(shape), count).reshape(shape)

        a, h = self.a, self.a.hidden_size
        once: dict[str, tuple[int, ...]] = {"embedding": (a.vocab_size, h), "final_norm": (h,)}
        once |= {} if a.tied else {"head": (a.vocab_size, h)}
        once |= {"final_norm_bias": (h,)} if a.norm == "layer" else {}
        once |= {"positions": (a.max_positions, h)} if a.rope is None else {}
        layers = []
        for layer in range(a.num_layers + a.mtp_layers):
            is_mtp = layer >= a.num_layers
            experts = a.moe is not None if is_mtp else layer in a.moe_layers
            shapes = self._attention_shapes() | self._mlp_shapes(experts)
            if is_mtp:
                shapes |= {"enorm": (h,), "hnorm": (h,), "eh_proj": (h, 2 * h), "mtp_norm": (h,)}
            held = {name: number(shape) for name, shape in shapes.items() if isinstance(shape, tuple)}
            held |= {name: [number(s) for s in shape] for name, shape in shapes.items() if isinstance(shape, list)}
            layers.append(held)
        return {name: number(shape) for name, shape in once.items()}, layers

    def _attention_shapes(self) -> dict[str, Any]:
        a, h = self.a, self.a.hidden_size
        shapes: dict[str, Any] = {"norm1": (h,)}
        if a.mla:
            n, z = a.num_heads, a.mla.key_value_rank
            keys = n * (a.mla.nope_dim + a.mla.rope_dim)
            shapes |= {
                "kv_down": (z + a.mla.rope_dim, h), "o": (h, n * a.mla.value_dim),
                "kv_up": (n * (a.mla.nope_dim + a.mla.value_dim), z),
            }  # fmt: skip
            shapes |= {"kv_norm": (z,)} if a.qk_norm else {}
            if a.mla.query_rank is None:
                return shapes | {"q_direct": (keys, h)} | ({"q_direct_norm": (h,)} if a.mla.query_norm else {})
            rank = a.mla.query_rank
            shapes |= {"q_down": (rank, h), "q_up": (keys, rank)}
            return shapes | ({"q_down_norm": (rank,)} if a.qk_norm else {})
        g, d, q = a.num_query_groups, a.head_dim, a.num_heads // a.num_query_groups
        shapes |= {"q": (g, q, d, h), "k": (g, d, h), "v": (g, d, h), "o": (h, g * q * d)}
        if a.qkv_bias or a.linear_bias:
            shapes |= {"q_bias": (g, q, d), "k_bias": (g, d), "v_bias": (g, d)}
        shapes |= {"o_bias": (h,)} if a.linear_bias else {}
        shapes |= {"q_norm": (d,), "k_norm": (d,)} if a.qk_norm else {}
        return shapes | ({"norm1_bias": (h,)} if a.norm == "layer" else {})

    def _mlp_shapes(self, experts: bool) -> dict[str, Any]:
        a, h = self.a, self.a.hidden_size
        if experts and a.moe:
            e, x, s = a.moe.num_experts, a.moe.ffn_size, a.moe.shared_ffn_size
            shapes = {"norm2": (h,), "router": (e, h)}
            shapes |= {"e_gate": [(x, h)] * e, "e_up": [(x, h)] * e, "e_down": [(h, x)] * e}
            shapes |= {"router_bias": (e,)} if a.moe.expert_bias else {}
            shapes |= {"s_gate": (s, h), "s_up": (s, h), "s_down": (h, s)} if s else {}
            return shapes | ({"shared_gate": (1, h)} if a.moe.shared_gate else {})
        shapes = {"norm2": (h,), "up": (a.ffn_size, h), "down": (h, a.ffn_size)}
        shapes |= {"gate": (a.ffn_size, h)} if a.gated else {}
        shapes |= {"up_bias": (a.ffn_size,), "down_bias": (h,)} if a.linear_bias else {}
        shapes |= {"gate_bias": (a.ffn_size,)} if a.linear_bias and a.gated else {}
        return shapes | ({"norm2_bias": (h,)} if a.norm == "layer" else {})

    # --- Hugging Face

    def huggingface(self) -> Arrays:
        """The tensors of a Hugging Face directory."""
        named = self._gpt2() if self.a.family == "gpt2" else self._llama()
        return {("", name, ()): array for name, array in named.items()}

    def _llama(self) -> dict[str, Any]:
        once, layers = self.weights
        found = {ONCE_HF[name]: array for name, array in once.items()}
        for layer, w in enumerate(layers):
            at = f"model.layers.{layer}."
            for name, array in w.items():
                if name in ("q", "k", "v", "q_bias", "k_bias", "v_bias"):
                    width = () if name.endswith("bias") else (self.a.hidden_size,)
                    found[at + LAYER_HF[name]] = array.reshape(-1, *width)
                elif isinstance(array, list):
                    for expert, one in enumerate(array):
                        found[f"{at}mlp.experts.{expert}.{name.removeprefix('e_')}_proj.weight"] = one
                else:
                    found[at + LAYER_HF[name]] = array
            if layer >= self.a.num_layers:  # MTP layers repeat embedding and head
                found[at + "embed_tokens.weight"] = once["embedding"]
                found[at + "shared_head.head.weight"] = once["embedding" if self.a.tied else "head"]
        return found

    def _gpt2(self) -> dict[str, Any]:
        once, layers = self.weights
        found = {
            "transformer.wte.weight": once["embedding"], "transformer.wpe.weight": once["positions"],
            "transformer.ln_f.weight": once["final_norm"], "transformer.ln_f.bias": once["final_norm_bias"],
        }  # fmt: skip
        if "head" in once:
            found["lm_head.weight"] = once["head"]
        for layer, w in enumerate(layers):
            qkv = np.concatenate([w[name].reshape(-1, self.a.hidden_size) for name in "qkv"])
            tensors = {
                "ln_1.weight": w["norm1"], "ln_1.bias": w["norm1_bias"],
                "ln_2.weight": w["norm2"], "ln_2.bias": w["norm2_bias"],
                "attn.c_attn.weight": qkv.T,
                "attn.c_attn.bias": np.concatenate([w[n].reshape(-1) for n in ("q_bias", "k_bias", "v_bias")]),
                "attn.c_proj.weight": w["o"].T, "attn.c_proj.bias": w["o_bias"],
                "mlp.c_fc.weight": w["up"].T, "mlp.c_fc.bias": w["up_bias"],
                "mlp.c_proj.weight": w["down"].T, "mlp.c_proj.bias": w["down_bias"],
            }  # fmt: skip
            found |= {f"transformer.h.{layer}.{name}": array for name, array in tensors.items()}
        return found

    # --- Megatron: whole tensors

    def once(self, padded: int, value: int | str) -> dict[str, Any]:
        """Whole Megatron tensors that exist once."""
        found = {ONCE_MEGATRON[name]: array for name, array in self.weights[0].items()}
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if name in found:
                found[name] = pad(found[name], padded, value)
        return found

    def of_layer(self, layer: int) -> dict[str, Any]:
        """Whole Megatron tensors of one layer: qkv with the groups interleaved, [gate; up]; experts as lists."""
        w, h, groups = self.weights[1][layer], self.a.hidden_size, range(self.a.num_query_groups)
        found = {LAYER_MEGATRON[name]: array for name, array in w.items() if name in LAYER_MEGATRON}
        if "q" in w:
            found["self_attention.linear_qkv.weight"] = np.concatenate(
                [part for g in groups for part in (w["q"][g].reshape(-1, h), w["k"][g], w["v"][g])]
            )
        if "q_bias" in w:
            found["self_attention.linear_qkv.bias"] = np.concatenate(
                [part for g in groups for part in (w["q_bias"][g].reshape(-1), w["k_bias"][g], w["v_bias"][g])]
            )
        mlp_norm = "pre_mlp_layernorm.weight" if "router" in w else "mlp.linear_fc1.layer_norm_weight"
        input_norm = "input_layernorm.weight" if self.a.mla else "self_attention.linear_qkv.layer_norm_weight"
        found |= {input_norm: w["norm1"], mlp_norm: w["norm2"]}
        if "up" in w:
            found["mlp.linear_fc1.weight"] = np.concatenate([w["gate"], w["up"]]) if "gate" in w else w["up"]
        if "up_bias" in w:
            halves = [w["gate_bias"], w["up_bias"]] if "gate_bias" in w else [w["up_bias"]]
            found["mlp.linear_fc1.bias"] = np.concatenate(halves)
        if "s_up" in w:
            found["mlp.shared_experts.linear_fc1.weight"] = np.concatenate([w["s_gate"], w["s_up"]])
        if "e_up" in w:
            pairs = zip(w["e_gate"], w["e_up"], strict=True)
            found["mlp.experts.linear_fc1.weight"] = [np.concatenate(pair) for pair in pairs]
            found["mlp.experts.linear_fc2.weight"] = w["e_down"]
        return found

    def shard(self, name: str, array: Any, count: int, rank: int, *, cut_down: bool = False) -> Any:
        """What one tp rank holds of a whole tensor (megatron-core tensor_parallel/layers.py)."""
        if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
            halves = np.split(array, 2) if self.a.gated else [array]
            return np.concatenate([np.split(half, count)[rank] for half in halves])
        if name.endswith(COLUMN_PARALLEL) or (cut_down and name.endswith(LOCAL_COLUMN_PARALLEL)):
            return np.split(array, count)[rank]
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            return np.split(array, count, axis=1)[rank]
        return array

    # --- Megatron: checkpoints

    def legacy(
        self, mesh: Mesh, spelling: Spelling, padded: int, value: int | str, files: Iterable[tuple[int, int, int]]
    ) -> Arrays:
        """The tensors of the files of these (tp, pp, ep), rank by rank."""
        found: Arrays = {}
        model_chunks = chunks(mesh, self.a.num_layers, self.a.mtp_layers)
        first, last = model_chunks[0], model_chunks[-1]
        mtp = [chunk for chunk in model_chunks if chunk.mtp]
        world = int(np.lcm(mesh.tp, mesh.expert_tp * mesh.ep))
        held = {(rank % mesh.tp, rank // mesh.expert_tp % mesh.ep): rank % mesh.expert_tp for rank in range(world)}
        for tp, ep in sorted({(tp, ep) for tp, _, ep in files}):
            etp = held.get((tp, ep), tp % mesh.expert_tp)

            def place(chunk: Chunk, name: str, array: Any, cut: str = "", tp: int = tp, ep: int = ep) -> None:
                cut_down = (
                    spelling.spec == "local" if spelling.cut_down_projections is None else spelling.cut_down_projections
                )
                shard = self.shard(cut or name, array, mesh.tp, tp, cut_down=cut_down)
                found[f"{tp}/{chunk.pp}/{ep}", spelled(name, spelling), (chunk.vpp,)] = shard

            def layer(chunk: Chunk, prefix: str, number: int, etp: int = etp, tp: int = tp, ep: int = ep) -> None:
                for name, array in self.of_layer(number).items():
                    if not isinstance(array, list):
                        outer = name in MTP_OUTER
                        place(chunk, (prefix.removesuffix("mtp_model_layer.") if outer else prefix) + name, array, name)
                        continue
                    local = np.split(np.arange(len(array)), mesh.ep)[ep]
                    held = [self.shard(name, array[expert], mesh.expert_tp, etp) for expert in local]
                    for shown, one in expert_tensors(name, held, spelling).items():
                        found[f"{tp}/{chunk.pp}/{ep}", spelled(prefix + shown, spelling), (chunk.vpp,)] = one

            for chunk in model_chunks:
                for number, at in enumerate(chunk.layers):
                    layer(chunk, f"decoder.layers.{number}.", at)
            for number in range(self.a.mtp_layers):
                layer(mtp[0], f"mtp.layers.{number}.mtp_model_layer.", self.a.num_layers + number)
            for name, array in self.once(padded, value).items():
                place(first if name.startswith("embedding") else last, name, array)
            embedding = self.once(padded, value)["embedding.word_embeddings.weight"]
            if self.a.tied and mesh.pp > 1:
                place(last, "output_layer.weight", embedding)
            if mtp and mtp[0].pp > 0:
                place(mtp[0], "embedding.word_embeddings.weight", embedding)
        return found

    def dist(self, padded: int, value: int | str, *, stacked: bool) -> dict[str, Any]:
        """Whole torch_dist tensors: layers in a leading dim or a key per layer, experts in a leading dim."""
        found = self.once(padded, value)
        layers = [self.of_layer(layer) for layer in range(self.a.num_layers + self.a.mtp_layers)]

        def whole(name: str, array: Any) -> tuple[str, Any]:
            if isinstance(array, list):
                return name.replace("experts.", "experts.experts."), np.stack(array)
            return name, array

        merged = [dict(whole(name, array) for name, array in one.items()) for one in layers]
        second = second_keys(self.a)
        for one in merged:
            one |= {second[name]: array for name, array in one.items() if name in second}
        own = merged[: self.a.num_layers]
        if stacked:
            found |= {f"decoder.layers.{name}": np.stack([one[name] for one in own]) for name in own[0]}
        else:
            found |= {f"decoder.layers.{n}.{name}": array for n, one in enumerate(own) for name, array in one.items()}
        for number, one in enumerate(merged[self.a.num_layers :]):
            for name, array in one.items():
                inner = "" if name in MTP_OUTER else "transformer_layer."
                found[f"mtp.layers.{number}.{inner}{name}"] = array
        return found


def pad(rows: Any, padded: int, value: int | str) -> Any:
    """Rows with padding rows of a value, or of the last row, after them."""
    missing = padded - len(rows)
    if value == "last":
        return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
    return np.concatenate([rows, np.full((missing, rows.shape[1]), value)])


def spelled(name: str, spelling: Spelling) -> str:
    """A key of per-rank files."""
    if spelling.spec == "local":
        for fused, alone in LOCAL_KEYS.items():
            name = name.replace(fused, alone)
    return name.replace("mtp_model_layer", spelling.mtp)


def expert_tensors(name: str, held: list[Any], spelling: Spelling) -> dict[str, Any]:
    """The tensors in which a rank's file holds its experts."""
    if spelling.experts == "grouped":
        return {f"{name}{number}": array for number, array in enumerate(held)}
    if spelling.experts == "sequential":
        return {
            name.replace("experts.", f"experts.local_experts.{number}."): array for number, array in enumerate(held)
        }
    if spelling.experts == "single":
        return {name: np.stack(held)}
    shown = name.replace("linear_fc1.weight", "weight1").replace("linear_fc2.weight", "weight2")
    return {shown: np.stack([array.T for array in held])}


# fmt: off
ONCE_HF = {
    "embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "final_norm": "model.norm.weight",
    "final_norm_bias": "model.norm.bias", "positions": "model.embed_positions.weight",
}
ONCE_MEGATRON = {
    "embedding": "embedding.word_embeddings.weight", "head": "output_layer.weight",
    "final_norm": "decoder.final_layernorm.weight", "final_norm_bias": "decoder.final_layernorm.bias",
    "positions": "embedding.position_embeddings.weight",
}
LAYER_HF = {
    "norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight",
    "norm1_bias": "input_layernorm.bias", "norm2_bias": "post_attention_layernorm.bias",
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight", "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight", "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias", "up_bias": "mlp.up_proj.bias", "down_bias": "mlp.down_proj.bias",
    "kv_down": "self_attn.kv_a_proj_with_mqa.weight", "kv_norm": "self_attn.kv_a_layernorm.weight",
    "kv_up": "self_attn.kv_b_proj.weight", "q_direct": "self_attn.q_proj.weight",
    "q_direct_norm": "self_attn.q_proj.layer_norm.weight",
    "q_down": "self_attn.q_a_proj.weight", "q_down_norm": "self_attn.q_a_layernorm.weight",
    "q_up": "self_attn.q_b_proj.weight", "router": "mlp.gate.weight", "router_bias": "mlp.gate.e_score_correction_bias",
    "s_gate": "mlp.shared_experts.gate_proj.weight", "s_up": "mlp.shared_experts.up_proj.weight",
    "s_down": "mlp.shared_experts.down_proj.weight", "shared_gate": "mlp.shared_expert_gate.weight",
    "enorm": "enorm.weight", "hnorm": "hnorm.weight", "eh_proj": "eh_proj.weight",
    "mtp_norm": "shared_head.norm.weight",
}
LAYER_MEGATRON = {
    "o": "self_attention.linear_proj.weight", "o_bias": "self_attention.linear_proj.bias",
    "q_norm": "self_attention.q_layernorm.weight", "k_norm": "self_attention.k_layernorm.weight",
    "norm1_bias": "self_attention.linear_qkv.layer_norm_bias", "norm2_bias": "mlp.linear_fc1.layer_norm_bias",
    "down": "mlp.linear_fc2.weight", "down_bias": "mlp.linear_fc2.bias",
    "kv_down": "self_attention.linear_kv_down_proj.weight", "kv_up": "self_attention.linear_kv_up_proj.weight",
    "kv_norm": "self_attention.linear_kv_up_proj.layer_norm_weight",
    "q_direct": "self_attention.linear_q_proj.weight", "q_direct_norm": "self_attention.linear_q_proj.layer_norm_weight",
    "q_down": "self_attention.linear_q_down_proj.weight",
    "q_down_norm": "self_attention.linear_q_up_proj.layer_norm_weight",
    "q_up": "self_attention.linear_q_up_proj.weight",
    "router": "mlp.router.weight", "router_bias": "mlp.router.expert_bias",
    "s_down": "mlp.shared_experts.linear_fc2.weight", "shared_gate": "mlp.shared_experts.gate_weight",
    "enorm": "enorm.weight", "hnorm": "hnorm.weight", "eh_proj": "eh_proj.weight", "mtp_norm": "final_layernorm.weight",
}
MTP_OUTER = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")
LOCAL_KEYS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
COLUMN_PARALLEL = (
    "linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight", "eh_proj.weight",
    "linear_q_proj.weight", "linear_q_up_proj.weight", "linear_kv_up_proj.weight",
)
LOCAL_COLUMN_PARALLEL = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight")
# fmt: on


def second_keys(a: Architecture) -> dict[str, str]:
    """Norms that the two specs name differently in torch_dist, where both names are written.

    The local spec maps its norms to the names of Transformer Engine's fused ones, but not with latent attention
    (gpt_layer_specs.py); before experts both have a norm of its own.
    """
    own, fused = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
    if not a.mla:
        return {own: fused}
    at = "self_attention."
    return {fused: own} | {
        f"{at}linear_{x}_up_proj.layer_norm_weight": f"{at}{x}_layernorm.weight" for x in ("q", "kv")
    }


@dataclass(frozen=True)
class Place:
    """A checkpoint of a model: its format and, where it has them, mesh, spelling, chunks."""

    format: str  # hf, legacy, dist, stacked or by_layer (the last two with the chunks that `seed` gives)
    mesh: Mesh = field(default_factory=Mesh)
    spelling: Spelling = field(default_factory=Spelling)
    padded: int = 0
    seed: int = 0
    copy_of_head: bool = False
    leave_out: str = ""  # "second" or "first": torch_dist keys of norms that have two
    ranks: str = (
        "all"  # per-rank files: those of all ranks, of "0.19" writers, or of "every" combination where etp divides tp
    )

    def files(self, truth: Truth) -> dict[tuple[int, int, int], str]:
        """The file of each (tp, pp, ep) that exists.

        0.19 writes the ranks whose dense or whose expert data parallel rank is 0: the first tp, the first etp x ep.
        """
        mesh = self.mesh
        world = int(np.lcm(mesh.tp, mesh.expert_tp * mesh.ep)) if truth.a.moe else mesh.tp * mesh.ep
        numbers = range(world)
        if self.ranks == "0.19" and truth.a.moe:
            numbers = range(max(mesh.tp, mesh.expert_tp * mesh.ep))
        found = {(rank % mesh.tp, rank // (mesh.expert_tp if truth.a.moe else mesh.tp) % mesh.ep) for rank in numbers}
        if self.ranks == "every" and mesh.tp % mesh.expert_tp == 0:
            found = set(product(range(mesh.tp), range(mesh.ep)))
        return {(tp, pp, ep): f"{tp}/{pp}/{ep}" for tp, ep in sorted(found) for pp in range(mesh.pp)}

    def layout(self, truth: Truth) -> Layout:
        """The layout under test."""
        a, sizes = truth.a, axis_sizes(truth.a)
        if self.format == "hf":
            return huggingface_layout(truth.rules, sizes, {key[1] for key in self.arrays(truth)})
        model_chunks = chunks(self.mesh, a.num_layers, a.mtp_layers)
        if self.format == "legacy":
            files = self.files(truth)
            return legacy_layout(truth.rules, sizes, self.padded, model_chunks, self.mesh, self.spelling, files)
        if self.format == "dist":
            return dist_layout(truth.rules, sizes, self.padded, model_chunks, self.mesh, stacked=a.uniform)
        return chunked_layout(truth.rules, sizes, self.padded, self.boxes(self.whole(truth, 0)))

    def whole(self, truth: Truth, value: int | str) -> dict[str, Any]:
        """The whole tensors of a torch_dist checkpoint."""
        found = truth.dist(self.padded, value, stacked=truth.a.uniform and self.format != "by_layer")
        for first, second in second_keys(truth.a).items() if self.format != "dist" else ():
            gone, kept = (first, second) if self.leave_out == "first" else (second, first)
            found = {
                name: array
                for name, array in found.items()
                if not (self.leave_out and name.endswith(gone) and name.removesuffix(gone) + kept in found)
            }
        return found

    def boxes(self, whole: Mapping[str, Any]) -> dict[str, list[Box]]:
        """Random boxes that tile every whole tensor."""
        rng = random.Random(self.seed)
        return {name: list(random_tiling(rng, array.shape)) for name, array in whole.items()}

    def arrays(self, truth: Truth, value: int | str = PADDING) -> Arrays:
        """The tensors that the checkpoint must hold, `value` ("last" repeats the last row) in the padding rows."""
        if self.format == "hf":
            found = truth.huggingface()
            if self.copy_of_head:
                found["", "lm_head.weight", ()] = truth.weights[0]["embedding"]
            return found
        if self.format == "legacy":
            return truth.legacy(self.mesh, self.spelling, self.padded, value, self.files(truth))
        whole = self.whole(truth, value)
        if self.format == "dist":
            # where ranks cut is the layout's own word; the test of the layout's keys says that it is right
            found, layout = {}, self.layout(truth)
            for key, piece in tensors(layout):
                lows, shape = key[2], layout.shape(piece)
                sizes = (1,) * (len(lows) - len(shape)) + shape
                cut = whole[key[1]][tuple(slice(low, low + n) for low, n in zip(lows, sizes, strict=True))]
                found[key] = cut.reshape(shape)
            return found
        found = {}
        stacked = truth.a.uniform and self.format == "stacked"
        for name, boxes in self.boxes(whole).items():
            leading = (stacked and name.startswith("decoder.layers.")) + ("experts.experts" in name)
            for low, size in boxes:
                cut = whole[name][tuple(slice(start, start + n) for start, n in zip(low, size, strict=True))]
                single = all(n == 1 for n in size[:leading])
                found["", name, low] = cut.reshape(size[leading:]) if single else cut
        return found


def tensors(layout: Layout) -> list[tuple[Key, Piece]]:
    """Every stored tensor of a layout."""
    return [(piece.key(ids), piece) for piece in layout.pieces for ids in piece.ids()]


def random_tiling(rng: random.Random, shape: tuple[int, ...], depth: int = 3) -> Iterator[Box]:
    """Boxes that tile a shape, cut anywhere, also irregularly; often into single layers."""

    def cut(low: tuple[int, ...], size: tuple[int, ...], left: int) -> Iterator[Box]:
        dims = [at for at, n in enumerate(size) if n > 1]
        if not left or not dims or rng.random() < 0.2:
            yield low, size
            return
        at = rng.choice(dims)
        first = rng.randrange(1, size[at])
        for start, extent in ((0, first), (first, size[at] - first)):
            yield from cut(_put(low, at, low[at] + start), _put(size, at, extent), left - 1)

    if len(shape) > 1 and rng.random() < 0.4:
        for layer in range(shape[0]):
            yield from cut((layer, *(0 for _ in shape[1:])), (1, *shape[1:]), depth - 1)
    else:
        yield from cut((0,) * len(shape), shape, depth)


def _put(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])


# ---------------------------------------------------------------------------------------------------------------------
# executing a plan, element by element


@dataclass(frozen=True)
class Result:
    """Target arrays, and how often each element was written (by primary and replica alike) and read (by primaries)."""

    arrays: Arrays
    written: Arrays
    read: Arrays


def execute(plan: Plan, source: Arrays, fill: int = 0) -> Result:
    """Apply the copies and fills of a plan with no regard for speed."""
    shapes = {key: plan.dst.shape(piece) for key, piece in tensors(plan.dst)}
    target = {key: np.full(prod(shape), -1) for key, shape in shapes.items()}
    written = {key: np.zeros(prod(shape), int) for key, shape in shapes.items()}
    read = {key: np.zeros(array.size, int) for key, array in source.items()}
    flat = {key: np.ascontiguousarray(array).reshape(-1) for key, array in source.items()}
    for copy in plan.copies:
        for _, src_key, src, dst_key, dst in copy.instances():
            froms, tos = src + _addresses(copy.shape, copy.src_strides), dst + _addresses(copy.shape, copy.dst_strides)
            assert froms.min() >= 0
            assert tos.min() >= 0
            target[dst_key][tos] = flat[src_key][froms]
            np.add.at(written[dst_key], tos, 1)
            if not copy.dst.replica and 0 not in copy.src_strides:
                np.add.at(read[src_key], froms, 1)
    for region in plan.fills:
        for ids in region.piece.ids():
            tos = region.offset + _addresses(region.shape, region.strides)
            target[region.piece.key(ids)][tos] = fill
            np.add.at(written[region.piece.key(ids)], tos, 1)
    arrays = {key: array.reshape(shapes[key]) for key, array in target.items()}
    return Result(arrays, written, read)


def _addresses(shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    total = np.zeros((1,) * len(shape), int)
    for at, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        total = total + (np.arange(size) * stride).reshape([size if n == at else 1 for n in range(len(shape))])
    return total.reshape(-1)


def same(found: Arrays, expected: Arrays) -> None:
    """Assert that two checkpoints hold the same."""
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].shape == array.shape, key
        assert np.array_equal(found[key], array), key


def padding_mask(layout: Layout, plan_regions: Any) -> dict[Key, Any]:
    """Which elements of a layout's tensors are padding."""
    found = {key: np.zeros(prod(layout.shape(piece)), bool) for key, piece in tensors(layout)}
    for region in plan_regions:
        for ids in region.piece.ids():
            found[region.piece.key(ids)][region.offset + _addresses(region.shape, region.strides)] = True
    return found


# ---------------------------------------------------------------------------------------------------------------------
# strategies


@cache
def splits(num_layers: int) -> tuple[Mesh, ...]:
    """Every pipeline split of a number of layers that megatron-core allows, with small numbers."""
    found = []
    ends = (None, 1, 2, 3)
    for pp, vpp, first, last in product((1, 2, 3, 4), (1, 2, 3), ends, ends):
        for embedding, loss in product((False, True), repeat=2):
            mesh = Mesh(1, pp, vpp, 1, None, first, last, embedding, loss)
            try:
                chunks(mesh, num_layers)
            except UsageError:
                continue
            found.append(mesh)
    return tuple(found)


@st.composite
def layout_strings(draw: st.DrawFn, num_layers: int, mtp: int = 0) -> tuple[int, str]:
    """A pipeline layout string, with its pp."""
    pp = draw(st.integers(1, 4))
    stages = pp * (draw(st.integers(1, 3)) if pp > 1 else 1)
    cuts = sorted(draw(st.integers(0, num_layers)) for _ in range(stages - 1))
    counts = [high - low for low, high in zip([0, *cuts], [*cuts, num_layers], strict=True)]
    parts = ["t" * count for count in counts]
    alone = pp > 1 and counts[-1] == 0 and draw(st.booleans())  # a stage of the loss alone after that of the MTP layers
    parts[-2 if alone else -1] += "m" * mtp
    return pp, "E" + "|".join(parts) + "L"


@st.composite
def pipelines(draw: st.DrawFn, num_layers: int, mtp: int) -> Mesh:
    """A pipeline split; tp is still 1."""
    if draw(st.integers(0, 3)) == 0:
        pp, text = draw(layout_strings(num_layers, mtp))
        return Mesh(pp=pp, pipeline_layout=text)
    return draw(st.sampled_from(splits(num_layers)))


def splits_heads(groups: int, q: int, d: int, tp: int) -> bool:
    """Whether tp divides the groups, or is a multiple of them that divides heads and rows."""
    if groups % tp == 0:
        return True
    return tp % groups == 0 and groups * q % tp == 0 and groups * (q + 2) * d % tp == 0


@st.composite
def truths(draw: st.DrawFn, tps: tuple[int, ...], eps: tuple[int, ...]) -> Truth:
    """A model whose heads and MLP rows all of `tps` divide, and whose experts all of `eps` divide."""
    heads = [
        (g, q, d)
        for g, q, d in product((1, 2, 3, 4, 6, 8, 12, 24), (1, 2, 3, 4, 8, 12), (1, 2, 3, 4))
        if g * q * d <= 64 and all(splits_heads(g, q, d, tp) for tp in tps)
    ]
    g, q, d = draw(st.sampled_from(heads))
    step = int(np.lcm.reduce(tps))
    a = Architecture(
        "llama",
        num_layers=draw(st.integers(1, 5)),
        hidden_size=draw(st.integers(1, 4)),
        num_heads=g * q,
        num_query_groups=g,
        head_dim=d,
        ffn_size=step * draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(1, 9)),
        max_positions=draw(st.integers(1, 3)),
        tied=draw(st.booleans()),
        norm=draw(st.sampled_from(["rms", "layer"])),
        rope=draw(st.sampled_from([None, Rope()])),
    )
    kind = draw(st.sampled_from(["gpt2", "dense", "dense", "experts", "latent"]))
    if kind == "gpt2":
        return Truth(replace(a, family="gpt2", norm="layer", gated=False, linear_bias=True, rope=None))
    flags = {name: draw(st.booleans()) for name in ("gated", "qkv_bias", "linear_bias", "qk_norm")}
    a = replace(a, **flags)
    if draw(st.integers(0, 2)) == 0:
        a = replace(a, mtp_layers=draw(st.integers(1, 2)), hidden_size=step)
    if kind == "dense":
        return Truth(a)
    a = replace(a, norm="rms", gated=True, linear_bias=False, moe=draw(mixtures(a.num_layers, step, eps)))
    return Truth(replace(a, mla=draw(latents(step)), num_heads=step, num_query_groups=step) if kind == "latent" else a)


@st.composite
def mixtures(draw: st.DrawFn, num_layers: int, step: int, eps: tuple[int, ...]) -> MixtureOfExperts:
    """Experts on all layers or on some."""
    some = tuple(sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1))))
    return MixtureOfExperts(
        num_experts=int(np.lcm.reduce(eps)) * draw(st.integers(1, 2)),
        top_k=1,
        ffn_size=int(np.lcm(step, 2)),
        layers=draw(st.sampled_from([some, tuple(range(num_layers))])),
        expert_bias=draw(st.booleans()),
        shared_ffn_size=draw(st.sampled_from([0, step])),
        shared_gate=draw(st.booleans()),
    )


@st.composite
def latents(draw: st.DrawFn, step: int) -> LatentAttention:
    """Latent attention whose ranks the local spec can cut as well."""
    rope = draw(st.integers(1, 2))
    rank = draw(st.sampled_from([None, step]))
    query_norm = rank is None and draw(st.booleans())
    return LatentAttention(rank, 3 * step - rope, draw(st.integers(1, 2)), rope, draw(st.integers(1, 2)), query_norm)


TPS = (1, 2, 3, 4, 8)
SOURCES = ("hf", "legacy", "dist", "stacked", "by_layer")
TARGETS = ("hf", "legacy", "dist")


@st.composite
def places(draw: st.DrawFn, truth: Truth, tp: int, ep: int, formats: tuple[str, ...]) -> Place:
    """A checkpoint of a model."""
    mesh = replace(draw(pipelines(truth.a.num_layers, truth.a.mtp_layers)), tp=tp)
    if truth.a.moe:
        mesh = replace(mesh, ep=ep, etp=draw(st.sampled_from([None, 1, 2])))
        try:
            rank_grid(mesh)
        except UsageError:
            mesh = replace(mesh, etp=None)
    spelling = Spelling(
        draw(st.sampled_from(["te", "local"])),
        draw(st.sampled_from(["grouped", "sequential", "single", "transposed"])),
        draw(st.sampled_from(["transformer_layer", "mtp_model_layer"])),
        draw(st.sampled_from([None, True, False])),
    )
    return Place(
        draw(st.sampled_from(formats)),
        mesh,
        spelling,
        padded=tp * (-(-truth.a.vocab_size // tp) + draw(st.integers(0, 3))),
        seed=draw(st.integers(0, 10**6)),
        copy_of_head=truth.a.tied and draw(st.booleans()),
        leave_out=draw(st.sampled_from(["", "first", "second"])),
        ranks=draw(st.sampled_from(["all", "0.19", "every"])),
    )


@st.composite
def worlds(draw: st.DrawFn, count: int) -> tuple[Truth, list[Place]]:
    """A model and `count` checkpoints of it; the last ones are of the formats that can be written."""
    tps = tuple(draw(st.sampled_from(TPS)) for _ in range(count))
    eps = tuple(draw(st.integers(1, 3)) for _ in range(count))
    truth = draw(truths(tps, eps))
    formats = [SOURCES] + [TARGETS] * (count - 1)
    return truth, [draw(places(truth, *pair)) for pair in zip(tps, eps, formats, strict=True)]
