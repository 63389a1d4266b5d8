"""Faults planted in converted checkpoints and in their args: `verify` catches each, and its logits level alone does.

The checkpoints are right but for the one fault; every one of them loads without complaint into megatron-core, unless
the fault is a tensor that is not there.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command, done

State = dict[str, torch.Tensor]
Megatron = Callable[..., Path]
TinyModel = Callable[[str], Path]

GROUPS, QUERIES, HEAD = 4, 2, 8  # of the tiny llama, at tp 1: rows of linear_qkv are (g (q d + d + d))


@contextmanager
def rank_file(checkpoint: Path, tp: int = 0, pp: int | None = None) -> Iterator[dict[str, Any]]:
    """The content of a rank's file; what the block changes is saved."""
    name = f"mp_rank_{tp:02d}" + ("" if pp is None else f"_{pp:03d}")
    path = checkpoint / "release" / name / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    yield content
    torch.save(content, path)


def each(state: State, ending: str) -> Iterator[str]:
    return iter([key for key in state if key.endswith(ending)])


def on_rank(change: Callable[[State], None], pp: int | None = None) -> Callable[[Path], None]:
    """A fault in the weights of one rank."""

    def plant(checkpoint: Path) -> None:
        with rank_file(checkpoint, pp=pp) as content:
            change(content["model"])

    return plant


def in_args(**changes: object) -> Callable[[Path], None]:
    """A fault in the args of all ranks."""

    def plant(checkpoint: Path) -> None:
        for path in checkpoint.glob("release/mp_rank_*/model_optim_rng.pt"):
            content = torch.load(path, weights_only=False)
            assert isinstance(content["args"], Namespace)
            for name, value in changes.items():
                assert getattr(content["args"], name) != value, "this is what the model has already"
                setattr(content["args"], name, value)
            torch.save(content, path)

    return plant


def swap(state: State, one: str, other: str) -> None:
    assert not torch.equal(state[one], state[other])
    state[one], state[other] = state[other].clone(), state[one].clone()


def grouped(value: torch.Tensor) -> torch.Tensor:
    """[group, its queries + key + value, head dim, ...]"""
    return value.reshape(GROUPS, QUERIES + 2, HEAD, *value.shape[1:])


def qkv_contiguous(state: State) -> None:
    """All queries, all keys, all values, as Hugging Face concatenates them, in place of group by group."""
    for key in each(state, "linear_qkv.weight"):
        rows = grouped(state[key])
        parts = rows[:, :QUERIES], rows[:, QUERIES], rows[:, QUERIES + 1]
        state[key] = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def query_groups_permuted(state: State) -> None:
    """In one layer, the last two groups exchanged; their output projection stays."""
    key = "decoder.layers.1.self_attention.linear_qkv.weight"
    state[key] = grouped(state[key])[[0, 1, 3, 2]].reshape_as(state[key])


def query_heads_permuted(state: State) -> None:
    """In one layer, the two query heads of the last group exchanged."""
    key = "decoder.layers.1.self_attention.linear_qkv.weight"
    rows = grouped(state[key]).clone()
    rows[3, [0, 1]] = rows[3, [1, 0]]
    state[key] = rows.reshape_as(state[key])


def key_heads_permuted(state: State) -> None:
    """In one layer, the keys of the first two groups exchanged; queries and values stay."""
    key = "decoder.layers.1.self_attention.linear_qkv.weight"
    rows = grouped(state[key]).clone()
    rows[[0, 1], QUERIES] = rows[[1, 0], QUERIES]
    state[key] = rows.reshape_as(state[key])


def rope_halves_interleaved(state: State) -> None:
    """The rows of all query and key heads in the order (0, 4, 1, 5, ...) of interleaved rope."""
    order = torch.arange(HEAD).reshape(2, -1).t().flatten()
    for key in each(state, "linear_qkv.weight"):
        rows = grouped(state[key]).clone()
        rows[:, : QUERIES + 1] = rows[:, : QUERIES + 1][:, :, order]
        state[key] = rows.reshape_as(state[key])


def gate_and_up_swapped(state: State) -> None:
    for key in each(state, "linear_fc1.weight"):
        state[key] = torch.cat(state[key].chunk(2)[::-1])


def gate_and_up_interleaved(state: State) -> None:
    for key in each(state, "linear_fc1.weight"):
        state[key] = torch.stack(state[key].chunk(2), dim=1).flatten(0, 1)


def layers_exchanged(state: State) -> None:
    for key in each(state, ""):
        if key.startswith("decoder.layers.1.") and isinstance(state[key], torch.Tensor):
            swap(state, key, key.replace("layers.1.", "layers.2."))


def norms_of_two_layers_swapped(state: State) -> None:
    name = "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight"
    swap(state, name.format(0), name.format(3))


def final_norm_is_another(state: State) -> None:
    """What a stage that is not the last would hold in its place: the norm of its last layer."""
    state["decoder.final_layernorm.weight"] = state["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"].clone()


def last_vocabulary_rows_shifted(state: State) -> None:
    """The last 8 rows one further, as padding in the wrong place would have them."""
    key = "output_layer.weight"
    state[key][112:120] = state[key][111:119].clone()


def last_embedding_rows_shifted(state: State) -> None:
    key = "embedding.word_embeddings.weight"
    state[key][112:120] = state[key][111:119].clone()


def one_bias_zeroed(state: State) -> None:
    state["decoder.layers.2.self_attention.linear_qkv.bias"].zero_()


def one_bias_removed(state: State) -> None:
    del state["decoder.layers.2.self_attention.linear_qkv.bias"]


def output_projection_transposed(state: State) -> None:
    key = "decoder.layers.2.self_attention.linear_proj.weight"
    state[key] = state[key].t().contiguous()


def head_is_not_tied(state: State) -> None:
    """The copy on the last stage holds something else."""
    state["output_layer.weight"] = state["output_layer.weight"].flip(1).contiguous()


def learned_positions_shifted(state: State) -> None:
    key = "embedding.position_embeddings.weight"
    state[key] = state[key].roll(2, dims=0)  # as OPT has them


def tp_shards_exchanged(checkpoint: Path) -> None:
    """Each rank is as before but for its output projections: two files renamed would be the same model, permuted."""
    with rank_file(checkpoint, 0) as one, rank_file(checkpoint, 1) as other:
        for key in each(one["model"], "linear_proj.weight"):
            one["model"][key], other["model"][key] = other["model"][key].clone(), one["model"][key].clone()


def tp_files_exchanged(checkpoint: Path) -> None:
    """The two ranks' files, whole: heads and MLP rows only change places, the vocabulary does more."""
    paths = [checkpoint / "release" / f"mp_rank_{tp:02d}" for tp in (0, 1)]
    aside = paths[0].with_name("aside")
    for source, target in ((paths[0], aside), (paths[1], paths[0]), (aside, paths[1])):
        source.rename(target)


def pipeline_stages_exchanged(checkpoint: Path) -> None:
    """The layers of the two stages, embedding and head stay where they are."""
    with rank_file(checkpoint, pp=0) as one, rank_file(checkpoint, pp=1) as other:
        for key in each(one["model"], ""):
            if key.startswith("decoder.layers."):
                one["model"][key], other["model"][key] = other["model"][key], one["model"][key]


def query_and_key_norms_exchanged(state: State) -> None:
    for key in each(state, "q_layernorm.weight"):
        other = key.replace("q_layernorm", "k_layernorm")
        state[key], state[other] = state[other].clone(), state[key].clone()


# fault: (model, tp, pp, how it is planted)
FAULTS: dict[str, tuple[str, int, int, Callable[[Path], None]]] = {
    "qkv_contiguous": ("llama", 1, 1, on_rank(qkv_contiguous)),
    "query_groups_permuted": ("llama", 1, 1, on_rank(query_groups_permuted)),
    "query_heads_permuted": ("llama", 1, 1, on_rank(query_heads_permuted)),
    "key_heads_permuted": ("llama", 1, 1, on_rank(key_heads_permuted)),
    "rope_halves_interleaved": ("llama", 1, 1, on_rank(rope_halves_interleaved)),
    "gate_and_up_swapped": ("llama", 1, 1, on_rank(gate_and_up_swapped)),
    "gate_and_up_interleaved": ("llama", 1, 1, on_rank(gate_and_up_interleaved)),
    "output_projection_transposed": ("llama", 1, 1, on_rank(output_projection_transposed)),
    "layers_exchanged": ("llama", 1, 1, on_rank(layers_exchanged)),
    "norms_of_two_layers_swapped": ("llama", 1, 1, on_rank(norms_of_two_layers_swapped)),
    "final_norm_of_another_stage": ("llama", 1, 2, on_rank(final_norm_is_another, pp=1)),
    "last_vocabulary_rows_shifted": ("llama", 1, 1, on_rank(last_vocabulary_rows_shifted)),
    "last_embedding_rows_shifted": ("llama", 1, 1, on_rank(last_embedding_rows_shifted)),
    "tp_shards_exchanged": ("llama", 2, 1, tp_shards_exchanged),
    "tp_files_exchanged": ("llama", 2, 1, tp_files_exchanged),
    "pipeline_stages_exchanged": ("llama", 1, 2, pipeline_stages_exchanged),
    "one_bias_zeroed": ("qwen2", 1, 1, on_rank(one_bias_zeroed)),
    "one_bias_removed": ("qwen2", 1, 1, on_rank(one_bias_removed)),
    "query_and_key_norms_exchanged": ("qwen3", 1, 1, on_rank(query_and_key_norms_exchanged)),
    "tied_head_not_tied": ("qwen2_tied", 1, 2, on_rank(head_is_not_tied, pp=1)),
    "learned_positions_shifted": ("gpt2", 1, 1, on_rank(learned_positions_shifted)),
    "rope_theta_1e4_for_1e6": ("qwen2", 1, 1, in_args(rotary_base=10000)),
    "eps_1e-5_for_1e-6": ("qwen2", 1, 1, in_args(norm_epsilon=1e-5)),
    "eps_1e-6_for_1e-5": ("llama", 1, 1, in_args(norm_epsilon=1e-6)),
    "llama3_scaling_dropped": ("llama3", 1, 1, in_args(use_rope_scaling=False)),
    "llama3_factor_32_for_8": ("llama3", 1, 1, in_args(rope_scaling_factor=32.0)),
    "linear_scaling_dropped": ("llama_linear", 1, 1, in_args(rotary_seq_len_interpolation_factor=None)),
    "window_ignored": ("mistral", 1, 1, in_args(window_size=None)),
    "window_off_by_one": ("mistral", 1, 1, in_args(window_size=(8, 0))),
    "gelu_erf_for_tanh": ("gpt2", 1, 1, in_args(bias_gelu_fusion=False)),
    "interleaved_rope": ("llama", 1, 1, in_args(rotary_interleaved=True)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_is_caught(
    fault: str, tiny_model: TinyModel, megatron: Megatron, tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    name, tp, pp, plant = FAULTS[fault]
    model, right = tiny_model(name), megatron(name, "torch", "te", tp, pp)
    wrong = tmp_path / "wrong"
    shutil.copytree(right, wrong)
    plant(wrong)

    result = command("verify", model, wrong, "--level", "logits", "--json", "-q")
    assert result.code == 1, result.out
    (level,) = result.json["levels"]
    assert result.json["same"] is False
    assert level["passed"] is False
    if fault == "one_bias_removed":
        assert "linear_qkv.bias" in level["problems"][0]
    else:
        assert level["problems"] == []
        record_property("ratio", level["ratio"])
        assert level["ratio"] > 4 * level["threshold"]
        assert level["first_diverging"]

    bits = command("verify", model, wrong, "--level", "accounting", "--level", "exact", "--json", "-q")
    assert bits.code == 1, bits.out
    assert not all(level["passed"] for level in bits.json["levels"])


@pytest.mark.parametrize(("name", "tp", "pp"), sorted({entry[:3] for entry in FAULTS.values()}))
def test_without_a_fault_each_is_right(name: str, tp: int, pp: int, tiny_model: TinyModel, megatron: Megatron) -> None:
    done("verify", tiny_model(name), megatron(name, "torch", "te", tp, pp), "-q")


def test_a_fault_is_caught_in_torch_dist_too(tiny_model: TinyModel, megatron: Megatron, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(megatron("llama", "torch", "te", 1, 1), wrong)
    on_rank(qkv_contiguous)(wrong)
    done("reshard", wrong, tmp_path / "dist", "--format", "torch_dist", "--tp", 2, "--pp", 2, "-q")
    for level in ("exact", "logits"):
        assert command("verify", tiny_model("llama"), tmp_path / "dist", "--level", level, "-q").code == 1


def test_a_wrong_round_trip_is_caught_between_hugging_face_directories(
    tiny_model: TinyModel, megatron: Megatron, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(megatron("llama", "torch", "te", 1, 1), wrong)
    on_rank(gate_and_up_swapped)(wrong)
    done("megatron2hf", wrong, tmp_path / "back", "-q")
    for level in ("exact", "logits"):
        assert command("verify", tiny_model("llama"), tmp_path / "back", "--level", level, "-q").code == 1
