"""The plan, judged by plain numpy: every checkpoint of a random model becomes every other one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from shardtool.errors import CheckpointError, UsageError
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import axis_sizes, standard
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import Layout
from shardtool.layout.megatron import Spelling, dist_layout
from shardtool.layout.mesh import Mesh, chunks, padded_vocab
from shardtool.plan.plan import plan, replicas
from worlds import PADDING, Place, Truth, execute, padding_mask, same, tensors, worlds

EXAMPLES = settings(max_examples=60, deadline=None)
LLAMA = Architecture("llama", 4, 16, 4, 2, 4, 12, 10, 32)


@EXAMPLES
@given(worlds(2))
def test_every_element_arrives_once(world):
    truth, (src, dst) = world
    made = plan(src.layout(truth), dst.layout(truth))
    source = src.arrays(truth)
    result = execute(made, source)
    same(result.arrays, dst.arrays(truth, 0))
    assert all((count == 1).all() for count in result.written.values())
    cut = padding_mask(made.src, made.cuts)
    held_twice = {key for key, piece in tensors(made.src) if piece.replica}
    for key, count in result.read.items():
        expected = np.zeros_like(count) if key in held_twice else np.where(cut[key], 0, 1)
        assert np.array_equal(count, expected), key
        assert (source[key].reshape(-1)[cut[key]] == PADDING).all()


@EXAMPLES
@given(worlds(2))
def test_padding_repeats_the_last_row(world):
    truth, (src, dst) = world
    result = execute(plan(src.layout(truth), dst.layout(truth), pad="last"), src.arrays(truth))
    same(result.arrays, dst.arrays(truth, "last"))
    assert all((count == 1).all() for count in result.written.values())


@EXAMPLES
@given(worlds(3))
def test_a_detour_changes_nothing(world):
    truth, (a, b, c) = world
    first = execute(plan(a.layout(truth), b.layout(truth)), a.arrays(truth))
    second = execute(plan(b.layout(truth), c.layout(truth)), first.arrays)
    same(second.arrays, execute(plan(a.layout(truth), c.layout(truth)), a.arrays(truth)).arrays)


@EXAMPLES
@given(worlds(2))
def test_replicas_are_recomputed_from_primaries(world):
    truth, places = world
    for place in places:
        layout = place.layout(truth)
        twins = replicas(layout)
        held_twice = {key for key, piece in tensors(layout) if piece.replica}
        if twins is None:
            assert not held_twice
            continue
        arrays = place.arrays(truth, 0)
        result = execute(twins, {key: array for key, array in arrays.items() if key not in held_twice})
        same(result.arrays, {key: arrays[key] for key in held_twice})
        assert all((count == 1).all() for count in result.written.values())


# ---------------------------------------------------------------------------------------------------------------------
# what a plan refuses


def hf(a: Architecture) -> Layout:
    return huggingface_layout(standard(a), axis_sizes(a))


def legacy(a: Architecture, mesh: Mesh, padded: int | None = None, spec: str = "te") -> Layout:
    rows = padded or padded_vocab(a.vocab_size, 1, mesh.tp)
    return Place("legacy", mesh, Spelling(spec), rows).layout(Truth(a))


def without(layout: Layout, name: str) -> Layout:
    return replace(layout, pieces=tuple(piece for piece in layout.pieces if piece.name != name))


def test_a_target_that_nothing_writes_is_named():
    source = without(hf(LLAMA), "model.layers.{l}.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="not written exactly once") as error:
        plan(source, legacy(LLAMA, Mesh(tp=2)))
    assert "decoder.layers.0.mlp.linear_fc1.weight (0/0/0): 96 of 192 elements" in error.value.details
    assert error.value.where == "Hugging Face -> Megatron torch, tp 2 pp 1"


def test_a_source_that_nothing_reads_is_named():
    target = without(legacy(LLAMA, Mesh()), "decoder.layers.{l}.mlp.linear_fc1.weight")
    with pytest.raises(CheckpointError, match="not read exactly once") as error:
        plan(hf(LLAMA), target)
    assert "model.layers.{l}.mlp.gate_proj.weight (Hugging Face): 0 of 768 elements" in error.value.details


def test_only_the_first_findings_are_shown():
    many = replace(LLAMA, num_layers=30)
    with pytest.raises(CheckpointError) as error:
        plan(without(hf(many), "model.layers.{l}.mlp.up_proj.weight"), legacy(many, Mesh(pp=30)))
    assert len(error.value.details) == 21
    assert error.value.details[-1] == "... and 10 more"


def test_a_layer_that_is_missing_is_named():
    source = hf(LLAMA)
    pieces = []
    for piece in source.pieces:
        names = tuple(replace(name, ids=(0, 1, 3)) for name in piece.names)
        pieces.append(replace(piece, names=names))
    with pytest.raises(CheckpointError) as error:
        plan(replace(source, pieces=tuple(pieces)), legacy(LLAMA, Mesh(pp=2)))
    assert "decoder.layers.0.mlp.linear_fc2.weight (0/1/0): 0 of 192 elements" in error.value.details


def test_layers_that_do_not_overlap_make_no_copy():
    """Ids that only seem to meet (their ranges overlap, they do not) must not become an empty copy."""
    source = legacy(LLAMA, Mesh(pp=2, vpp=2))
    made = plan(source, legacy(LLAMA, Mesh(pp=4)))
    assert all(loop.ids for copy in made.copies for loop in copy.loops)


# ---------------------------------------------------------------------------------------------------------------------
# a plan as data


def test_as_dict_is_json_and_says_everything():
    made = plan(hf(LLAMA), legacy(LLAMA, Mesh(tp=2, pp=2), padded=12))
    data = json.loads(json.dumps(made.as_dict()))
    assert data["from"] == "Hugging Face"
    assert data["to"] == "Megatron torch, tp 2 pp 2"
    assert data["pad"] == "zeros"
    assert [item["shape"] for item in data["fills"]] == [[2, 16], [2, 16]]
    assert not data["cuts"]
    assert sum(len(rule["copies"]) for rule in data["rules"]) == len(made.copies)
    (qkv,) = (rule for rule in data["rules"] if rule["megatron"].endswith("linear_qkv.weight"))
    assert qkv["hf"][0] == "model.layers.{l}.self_attn.q_proj.weight"
    assert qkv["copies"][0] == {
        "component": 0,
        "from": ["", "model.layers.{l}.self_attn.q_proj.weight", []],
        "to": ["0/0/0", "decoder.layers.{l}.self_attention.linear_qkv.weight", [0]],
        "shape": [1, 2, 4, 16],
        "axes": ["g", "q", "d", "h"],
        "from_offset": 0,
        "from_strides": [128, 64, 16, 1],
        "to_offset": 0,
        "to_strides": [256, 64, 16, 1],
        "loops": [["l", [0, 1], 0, 0]],
        "replica": False,
    }


def test_cuts_are_in_the_data():
    made = plan(legacy(LLAMA, Mesh(), padded=12), hf(LLAMA))
    assert [(cut["name"], cut["shape"], cut["offset"]) for cut in made.as_dict()["cuts"]] == [
        ("embedding.word_embeddings.weight", [2, 16], 160),
        ("output_layer.weight", [2, 16], 160),
    ]


def test_the_digest_changes_with_every_option():
    a = LLAMA
    sizes, rules = axis_sizes(a), standard(a)
    targets = [
        legacy(a, Mesh()),
        legacy(a, Mesh(), spec="local"),
        legacy(a, Mesh(tp=2)),
        legacy(a, Mesh(pp=2)),
        legacy(a, Mesh(pp=2, vpp=2)),
        legacy(a, Mesh(pp=2, first_stage_layers=1)),
        legacy(a, Mesh(pp=2, account_for_embedding=True, account_for_loss=True, vpp=3)),
        legacy(a, Mesh(pp=2, pipeline_layout="E|ttttL")),
        legacy(a, Mesh(), padded=16),
        dist_layout(rules, sizes, 10, chunks(Mesh(), 4), Mesh()),
        hf(a),
    ]
    digests = [plan(hf(a), target).digest() for target in targets]
    digests += [plan(hf(a), legacy(a, Mesh(), padded=16), pad=pad).digest() for pad in ("last", "mean")]
    digests += [plan(hf(b), hf(b)).digest() for b in (replace(a, tied=True), replace(a, num_layers=5))]
    assert len(set(digests)) == len(digests)


@EXAMPLES
@given(worlds(2))
def test_the_digest_is_that_of_the_plain_data(world):
    truth, (src, dst) = world
    made = plan(src.layout(truth), dst.layout(truth))
    text = json.dumps(made.as_dict(), sort_keys=True)
    assert made.digest() == hashlib.sha256(text.encode()).hexdigest()


SCRIPT = """
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import axis_sizes, standard
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.megatron import dist_layout
from shardtool.layout.mesh import Mesh, chunks
from shardtool.plan.plan import plan
a = Architecture("llama", 4, 16, 4, 2, 4, 12, 10, 32)
mesh = Mesh(tp=2, pp=2)
target = dist_layout(standard(a), axis_sizes(a), 12, chunks(mesh, 4), mesh)
made = plan(huggingface_layout(standard(a), axis_sizes(a)), target)
print(made.digest())
"""


def test_the_digest_is_the_same_in_every_process():
    found = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


# ---------------------------------------------------------------------------------------------------------------------
# a large model

LLAMA_405B = Architecture("llama", 126, 16384, 128, 8, 128, 53248, 128256, 131072)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(tp=8, pp=16, first_stage_layers=7, last_stage_layers=7),
        Mesh(tp=8, pp=16, account_for_embedding=True, account_for_loss=True),
        Mesh(tp=8, pp=16, vpp=8, account_for_embedding=True, account_for_loss=True),
    ],
)
def test_llama_405b(mesh):
    """126 layers do not divide by 16 stages: the ends take fewer."""
    made = plan(hf(LLAMA_405B), legacy(LLAMA_405B, mesh, padded_vocab(128256, 128, 8)))
    assert made.dst.shape(next(p for p in made.dst.pieces if p.name.endswith("linear_qkv.weight"))) == (2304, 16384)
    # norms are on every tp rank: 126 x (2 on each of 8 ranks + 4 matrices on 8 ranks), embedding, head, final norm
    assert sum(piece.instances for piece in made.dst.pieces) == 126 * 8 * 6 + 8 * 3


def test_llama_405b_does_not_divide():
    with pytest.raises(UsageError, match="126 layers do not divide over 16 pipeline stages"):
        legacy(LLAMA_405B, Mesh(tp=8, pp=16))


def test_the_engine_of_this_test_finds_a_wrong_plan():
    """A planted fault: the numpy statement must not be blind."""
    truth = Truth(LLAMA)
    made = plan(Place("hf").layout(truth), Place("legacy", padded=10).layout(truth))
    first = next(copy for copy in made.copies if copy.dst.name.endswith("linear_qkv.weight"))
    wrong = replace(first, src_strides=tuple(reversed(first.src_strides)))
    broken = replace(made, copies=tuple(wrong if copy is first else copy for copy in made.copies))
    with pytest.raises((AssertionError, IndexError)):
        same(execute(broken, Place("hf").arrays(truth)).arrays, Place("legacy", padded=10).arrays(truth, 0))
