"""Layouts: keys, shapes and cuts of the four kinds, against the plain numpy statement of tests/unit/worlds.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from shardtool.errors import UsageError
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import axis_sizes, standard
from shardtool.layout.chunks import chunked_layout, per_layer_keys
from shardtool.layout.equation import parse_tensor
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import NameAxis, Piece
from shardtool.layout.megatron import Spelling, dist_layout, expert_block, legacy_layout, rank_grid, tp_cuts
from shardtool.layout.mesh import Mesh, chunks
from shardtool.layout.rules import rule
from shardtool.plan.plan import plan
from worlds import Place, Truth, execute, same, tensors, worlds

LLAMA = Architecture("llama", 4, 16, 4, 2, 4, 12, 10, 32)
LLAMA_NORM = parse_tensor("h")


@settings(max_examples=60, deadline=None)
@given(worlds(2))
def test_keys_and_shapes(world):
    """Every layout names the tensors that the checkpoint has, with their shapes."""
    truth, places = world
    for place in places:
        layout = place.layout(truth)
        shapes = {key: layout.shape(piece) for key, piece in tensors(layout)}
        assert len(shapes) == sum(piece.instances for piece in layout.pieces)
        assert shapes == {key: array.shape for key, array in place.arrays(truth).items()}


@settings(max_examples=60, deadline=None)
@given(worlds(2))
def test_legacy_files_are_megatrons_rules(world):
    """Group-interleaved qkv cut in contiguous rows, [gate_r; up_r], column and row parallel, padded vocabulary rows."""
    truth, (place, _) = world
    target = dataclasses.replace(place, format="legacy", copy_of_head=False)
    made = plan(Place("hf").layout(truth), target.layout(truth))
    same(execute(made, truth.huggingface()).arrays, target.arrays(truth, 0))


def test_every_key_comes_with_its_piece():
    layout = Place("legacy", Mesh(tp=2), padded=12).layout(Truth(LLAMA))
    assert list(layout.tensors()) == tensors(layout)


@pytest.mark.parametrize("name", ["w", "100%", "{l}", "{l}.{e}", "{e}.{l}", "{e}", "{l}{l}"])
@pytest.mark.parametrize("part", [(), (2, 0), ("l", "e", 0), ("l", 1, "e"), ("e", "l"), ("l",)])
def test_all_keys_are_those_of_the_ids(name, part):
    names = (NameAxis("l", (4, 6, 7), 4), NameAxis("e", (0, 1)))
    piece = Piece(0, 0, LLAMA_NORM, name, "file", names, part=part)
    assert list(piece.all_keys()) == [piece.key(ids) for ids in piece.ids()]
    assert list(piece.keyed()) == [(ids, piece.key(ids)) for ids in piece.ids()]


def test_a_name_without_axes_is_one_key():
    assert list(Piece(0, 0, LLAMA_NORM, "w", part=(1,)).all_keys()) == [("", "w", (1,))]
    assert list(Piece(0, 0, LLAMA_NORM, "w", names=(NameAxis("l", ()),)).all_keys()) == []


def test_legacy_by_hand():
    """Llama's qkv and MLP at tp 2, spelled out."""
    truth = Truth(LLAMA)
    place = Place("legacy", Mesh(tp=2), padded=12)
    found = execute(plan(Place("hf").layout(truth), place.layout(truth)), truth.huggingface()).arrays
    source = {key[1]: array for key, array in truth.huggingface().items()}
    q, k, v = (source[f"model.layers.3.self_attn.{name}_proj.weight"] for name in "qkv")
    qkv = found["1/0/0", "decoder.layers.3.self_attention.linear_qkv.weight", (0,)]
    assert np.array_equal(qkv, np.concatenate([q[8:16], k[4:8], v[4:8]]))
    gate, up = (source[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    fc1 = found["1/0/0", "decoder.layers.0.mlp.linear_fc1.weight", (0,)]
    assert np.array_equal(fc1, np.concatenate([gate[6:], up[6:]]))
    fc2 = found["0/0/0", "decoder.layers.0.mlp.linear_fc2.weight", (0,)]
    assert np.array_equal(fc2, source["model.layers.0.mlp.down_proj.weight"][:, :6])
    embedding = found["1/0/0", "embedding.word_embeddings.weight", (0,)]
    assert np.array_equal(embedding[:4], source["model.embed_tokens.weight"][6:])
    assert (embedding[4:] == 0).all()


def test_more_ranks_than_query_groups():
    """tp 4 over 2 groups: contiguous rows of the whole qkv (megatron-core 0.16 and newer)."""
    truth = Truth(LLAMA)
    place = Place("legacy", Mesh(tp=4), padded=12)
    found = execute(plan(Place("hf").layout(truth), place.layout(truth)), truth.huggingface()).arrays
    whole = truth.of_layer(1)["self_attention.linear_qkv.weight"]
    for rank in range(4):
        qkv = found[f"{rank}/0/0", "decoder.layers.1.self_attention.linear_qkv.weight", (0,)]
        assert np.array_equal(qkv, whole[8 * rank : 8 * rank + 8])


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        ({}, 3, "tp 3 does not divide 2 query groups"),
        ({"num_heads": 6}, 4, "tp 4 does not divide 6 attention heads"),
        ({"num_heads": 2, "num_query_groups": 1, "head_dim": 1}, 2, None),
        ({"num_heads": 3, "num_query_groups": 1, "head_dim": 1}, 3, "tp 3 does not divide 1 query groups"),
        ({"ffn_size": 13}, 2, "tp 2 does not divide 13 rows of the MLP"),
    ],
)
def test_what_tp_cannot_cut(change, tp, message):
    a = replace(LLAMA, **change)

    def make():
        return Place("legacy", Mesh(tp=tp), padded=12).layout(Truth(a))

    if message is None:
        make()
        return
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "--tp" in str(error.value.hint)


def test_ranks_that_file_names_cannot_tell_apart():
    """With etp 2 and tp 1, ranks 0 and 1 are both (tp 0, ep 0), and hold different shards of the experts."""
    assert rank_grid(Mesh(tp=2, ep=2, etp=1)) == {(0, 0): 0, (1, 1): 0}
    assert rank_grid(Mesh(tp=2, ep=2)) == {(0, 0): 0, (1, 0): 1, (0, 1): 0, (1, 1): 1}
    with pytest.raises(UsageError, match="cannot hold etp 2 with tp 1 and ep 2") as error:
        rank_grid(Mesh(tp=1, ep=2, etp=2))
    assert "torch_dist" in str(error.value.hint)


def test_experts_that_do_not_divide():
    with pytest.raises(UsageError, match="ep 4 does not divide 6 experts"):
        expert_block({"e": 6}, Mesh(ep=4), 0)
    assert expert_block({"e": 6}, Mesh(ep=3), 1) == (2, 3)


def test_a_vocabulary_that_is_not_padded():
    with pytest.raises(UsageError, match="tp 4 does not divide 10 rows of the padded vocabulary"):
        tp_cuts(standard(LLAMA)[0], 4, {**axis_sizes(LLAMA), "v": 10})


def test_other_axes_are_named_by_their_letter():
    with pytest.raises(UsageError, match="tp 2 does not divide 3 of axis c"):
        tp_cuts(rule("a", "c -> c", "b", "c"), 2, {"c": 3})


def test_the_axis_of_a_torch_dist_shard_is_outermost():
    """A range of an inner axis is no contiguous chunk: such a rule is a mistake of ours, not of the user."""
    odd = (rule("a", "x y -> (x y)", "embedding.b", "y"),)
    with pytest.raises(ValueError, match="axis y is not outermost"):
        dist_layout(odd, {"x": 2, "y": 4}, 0, chunks(Mesh(tp=2), 1), Mesh(tp=2))


def test_spellings():
    norm = "decoder.layers.{l}.self_attention.linear_qkv.layer_norm_weight"
    assert Spelling("te").key(norm) == norm
    assert Spelling("local").key(norm) == "decoder.layers.{l}.input_layernorm.weight"
    assert Spelling("local").key("a.mlp.linear_fc1.layer_norm_bias") == "a.pre_mlp_layernorm.bias"
    assert Spelling("local").key("a.mlp.linear_fc1.weight") == "a.mlp.linear_fc1.weight"
    assert Spelling("local").key("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"
    expert = "a.mlp.experts.linear_fc1.weight{e}"
    assert {kind: Spelling(experts=kind).key(expert) for kind in ("grouped", "sequential", "single", "transposed")} == {
        "grouped": expert,
        "sequential": "a.mlp.experts.local_experts.{e}.linear_fc1.weight",
        "single": "a.mlp.experts.linear_fc1.weight",
        "transposed": "a.mlp.experts.weight1",
    }
    assert Spelling().key("mtp.layers.{m}.transformer_layer.x") == "mtp.layers.{m}.mtp_model_layer.x"


def test_stages_without_layers():
    """A stage of nothing but the embedding, one of nothing but the head; the tied copy is on the last."""
    a = replace(LLAMA, tied=True)
    mesh = Mesh(pp=3, pipeline_layout="E|tttt|L")
    rules, sizes = standard(a), axis_sizes(a)
    legacy = Place("legacy", mesh, padded=10).layout(Truth(a))
    held = [{key[1] for key, _ in tensors(legacy) if key[0] == f"0/{pp}/0"} for pp in range(3)]
    assert held[0] == {"embedding.word_embeddings.weight"}
    assert held[2] == {"decoder.final_layernorm.weight", "output_layer.weight"}
    assert [piece.name for piece in legacy.pieces if piece.replica] == ["output_layer.weight"]
    dist = dist_layout(rules, sizes, 10, chunks(mesh, 4), mesh)
    assert {piece.file for piece in dist.pieces if piece.names} == {"__1_0.distcp"}


def test_torch_dist_keys():
    dist = dist_layout(standard(LLAMA), axis_sizes(LLAMA), 12, chunks(Mesh(tp=2, pp=2), 4), Mesh(tp=2, pp=2))
    keys = {key for key, _ in tensors(dist)}
    # [gate; up]: a rank holds a part of each, so its chunks are at its rows of the one and of the other
    fc1 = {key for key in keys if key[1] == "decoder.layers.mlp.linear_fc1.weight" and key[2][0] == 3}
    assert fc1 == {
        (f"__{2 + rank}_0.distcp", "decoder.layers.mlp.linear_fc1.weight", (3, rows, 0))
        for rank, rows in ((0, 0), (1, 6), (0, 12), (1, 18))
    }
    assert ("__2_0.distcp", "decoder.final_layernorm.weight", (0,)) in keys
    assert ("__1_0.distcp", "embedding.word_embeddings.weight", (6, 0)) in keys


def test_chunked_layout_of_an_incomplete_checkpoint():
    """What is absent gets its place all the same, so that the accounting can name it."""
    rules, sizes = standard(LLAMA), axis_sizes(LLAMA)
    stacked = chunked_layout(rules, sizes, 12, {})
    assert stacked.description == "Megatron torch_dist, stacked layers"
    keys = {key[1:] for key, _ in tensors(stacked)}
    assert ("decoder.layers.mlp.linear_fc2.weight", (3, 0, 0)) in keys
    assert ("decoder.final_layernorm.weight", (0,)) in keys
    each = chunked_layout(rules, sizes, 12, {"decoder.layers.0.mlp.linear_fc2.weight": [((0, 0), (16, 12))]})
    assert each.description == "Megatron torch_dist, per-layer keys"
    assert ("decoder.layers.3.mlp.linear_fc2.weight", (0, 0)) in {key[1:] for key, _ in tensors(each)}
    assert per_layer_keys(["decoder.layers.11.x"])
    assert not per_layer_keys(["decoder.layers.x", "decoder.final_layernorm.weight"])


def test_a_copy_of_the_tied_head():
    a = replace(LLAMA, tied=True)
    layout = huggingface_layout(standard(a), axis_sizes(a), {"lm_head.weight"})
    assert [(piece.name, piece.replica) for piece in layout.pieces if piece.replica] == [("lm_head.weight", True)]
    assert not any(piece.replica for piece in huggingface_layout(standard(a), axis_sizes(a)).pieces)


def test_a_piece_with_two_name_axes():
    """Experts will have one more axis in their names; `part` may name an axis too, and counts globally."""
    dims = rule("a", "x -> x", "b").target
    names = (NameAxis("l", (4, 5), 4), NameAxis("e", (0, 2)))
    piece = Piece(0, 0, dims, "layers.{l}.experts.{e}", "f", names, part=("l", 7))
    assert piece.instances == 4
    assert [piece.key(ids) for ids in piece.ids()][:2] == [
        ("f", "layers.0.experts.0", (4, 7)),
        ("f", "layers.0.experts.2", (4, 7)),
    ]


@pytest.mark.parametrize(
    ("names", "equation", "megatron", "message"),
    [
        (("a", "b"), "x -> x", "c", "2 names"),
        ("a", "x -> x, x", "c", "components"),
        ("a", "(x + y) -> x, y", "c", "1 names"),
        ("a.{l}", "x -> x", "c", "a layer in the name on one side only"),
        ("a", "x -> x", "c.{l}", "a layer in the name on one side only"),
    ],
)
def test_rules_that_do_not_fit(names, equation, megatron, message):
    with pytest.raises(ValueError, match=message):
        rule(names, equation, megatron)


def test_biases_of_experts_over_expert_tensor_parallel_ranks():
    """The first linear's are cut like its rows; the second's are whole on every rank, and replicas but on the first."""
    at = "decoder.layers.{l}.mlp.experts."
    rules = (
        rule("one.{l}", "e (x (1 + 1)) -> e (x + x)", at + "linear_fc1.bias{e}", "x"),
        rule("two.{l}", "e h -> e h", at + "linear_fc2.bias{e}"),
    )
    sizes, mesh = {"l": 1, "e": 2, "x": 4, "h": 3, "v": 8, "m": 0}, Mesh(tp=2, ep=2, etp=2)
    files = {(tp, 0, ep): f"{tp}{ep}" for tp in range(2) for ep in range(2)}
    for spelling, name in (
        (Spelling(), "linear_fc{}.bias{{e}}"),
        (Spelling("local", "sequential"), "local_experts.{{e}}.linear_fc{}.bias"),
    ):
        layout = legacy_layout(rules, sizes, 8, chunks(mesh, 1), mesh, spelling, files)
        first, second = ([piece for piece in layout.pieces if piece.rule == number] for number in (0, 1))
        assert {piece.name for piece in first} == {at + name.format(1)}
        assert {piece.name for piece in second} == {at + name.format(2)}
        assert [(piece.file, piece.ranges, piece.replica, layout.shape(piece)) for piece in first] == [
            ("00", (("x", 0, 2),), False, (4,)), ("10", (("x", 2, 4),), False, (4,)),
            ("01", (("x", 0, 2),), False, (4,)), ("11", (("x", 2, 4),), False, (4,)),
        ]  # fmt: skip
        assert [(piece.file, piece.ranges, piece.replica, layout.shape(piece)) for piece in second] == [
            ("00", (), False, (3,)), ("10", (), True, (3,)), ("01", (), False, (3,)), ("11", (), True, (3,)),
        ]  # fmt: skip
        plan(huggingface_layout(rules, sizes), layout)  # every element once
    layout = dist_layout(rules, sizes, 8, chunks(mesh, 1), mesh)
    keys = {(key[1], key[2]) for key, _ in layout.tensors()}
    first = "decoder.layers.mlp.experts.experts.linear_fc1.bias"
    assert keys == {(first, (0, e, start)) for e in range(2) for start in (0, 2, 4, 6)} | {
        ("decoder.layers.mlp.experts.experts.linear_fc2.bias", (0, e, 0)) for e in range(2)
    }
