"""EXPLAIN: what a plan says about itself."""

from __future__ import annotations

import json

from hypothesis import given, settings
from msgspec.structs import replace

from shardtool.families.architecture import Architecture
from shardtool.families.blocks import axis_sizes, standard
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.mesh import Mesh
from shardtool.plan.explain import explain, summary
from shardtool.plan.plan import plan
from worlds import Place, Truth, execute, worlds

LLAMA = Truth(Architecture("llama", 4, 16, 4, 2, 4, 12, 10, 32, tied=True))


def blocks(lines: list[str]) -> list[list[str]]:
    """The header and the block of each rule."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line:
            found[-1].append(line)
        else:
            found.append([])
    return found


def test_hf_to_per_rank_files():
    made = plan(Place("hf").layout(LLAMA), Place("legacy", Mesh(tp=2, pp=2), padded=12).layout(LLAMA))
    header, *rules = blocks(explain(made, {id(piece): "bfloat16" for piece in made.dst.pieces}))
    assert header == [
        "from     Hugging Face",
        "to       Megatron torch, tp 2 pp 2",
        "layers   4",
        "tensors  38 read, 54 written, 11 of them replicas",
        "bytes    11.8 KiB written: bfloat16 11.8 KiB",
        "copies   78",
    ]
    assert rules[0] == [
        "model.embed_tokens.weight -> embedding.word_embeddings.weight",
        "  layout   v h -> v h",
        "  sizes    v 10, h 16",
        "  read     1 of 10 x 16, whole",
        "  write    4 of 6 x 16 bfloat16, axis v in 2 parts of 6, 2 of them replicas",
        "  copies   4, largest 6 x 16 (v h), runs of 96 elements",
        "  padding  2 rows are filled with zeros",
    ]
    assert rules[2] == [
        "model.layers.{0-3}.self_attn.{q,k,v}_proj.weight -> decoder.layers.{0-3}.self_attention.linear_qkv.weight",
        "  layout   (g q d) h, (g d) h, (g d) h -> (g (q d + d + d)) h",
        "  sizes    g 2, q 2, d 4, h 16",
        "  read     4 of 16 x 16, 8 of 8 x 16, whole",
        "  write    8 of 16 x 16 bfloat16, axis g in 2 parts of 1",
        "  copies   24, largest 2 x 4 x 16 (q d h), runs of 128 elements",
    ]
    assert rules[3][-1] == "  copies   8, largest 16 x 2 x 4 (h q d), runs of 8 elements"
    assert "  write    8 of 16 bfloat16, whole, 4 of them replicas" in rules[1]


def test_transposed_weights_have_short_runs():
    gpt2 = Truth(
        Architecture("gpt2", 1, 16, 4, 4, 4, 12, 10, 32, norm="layer", gated=False, linear_bias=True, rope=None)
    )
    made = plan(Place("hf").layout(gpt2), Place("dist", padded=10).layout(gpt2))
    (rule,) = (rule for rule in blocks(explain(made)) if "mlp.c_fc.weight" in rule[0])
    assert rule[0] == "transformer.h.0.mlp.c_fc.weight -> decoder.layers.mlp.linear_fc1.weight"
    assert rule[-1] == "  copies   1, largest 12 x 16 (f h), runs of 1 elements"


def test_torch_dist_to_hf():
    source = Place("dist", Mesh(tp=2), padded=16)
    made = plan(source.layout(LLAMA), Place("hf").layout(LLAMA))
    rules = {rule[0]: rule for rule in blocks(explain(made))}
    fc1 = rules["decoder.layers.mlp.linear_fc1.weight -> model.layers.{0-3}.mlp.{gate,up}_proj.weight"]
    assert fc1[1] == "  layout   (f + f) h -> f h, f h"
    assert fc1[3] == "  read     16 of 6 x 16, dim 0 in 4 parts of 6"
    embedding = rules["embedding.word_embeddings.weight -> model.embed_tokens.weight"]
    assert embedding[-1] == "  padding  6 rows of the source are left out"


def test_uneven_chunks_with_a_key_per_layer():
    source = Place("by_layer", padded=16, seed=7)
    made = plan(source.layout(LLAMA), Place("legacy", Mesh(tp=2), padded=16).layout(LLAMA), pad="last")
    lines = explain(made)
    assert any("decoder.layers.{0-3}.mlp.linear_fc1.weight ->" in line for line in lines)
    assert any("of other shapes" in line for line in lines)
    assert "  padding  6 rows are filled with the last row repeated" in lines


def test_layers_with_gaps():
    layout = Place("hf").layout(LLAMA)
    pieces = tuple(
        replace(piece, names=tuple(replace(name, ids=(0, 2, 3)) for name in piece.names)) for piece in layout.pieces
    )
    some = replace(layout, pieces=pieces)
    assert any(line.startswith("model.layers.{0,2-3}.") for line in explain(plan(some, some)))


def test_bytes():
    made = plan(Place("hf").layout(LLAMA), Place("hf").layout(LLAMA))
    dtypes = {id(piece): "bool" if piece.names else "float8_e4m3fn" for piece in made.dst.pieces}
    assert explain(made, dtypes)[4] == "bytes    5.5 KiB written: bool 5.4 KiB, float8_e4m3fn 176 B"
    large = replace(LLAMA.a, ffn_size=10**10)
    layout = huggingface_layout(standard(large), axis_sizes(large))
    made = plan(layout, layout)
    assert explain(made, {id(piece): "float32" for piece in made.dst.pieces})[4].startswith("bytes    6.98 TiB")


@settings(max_examples=30, deadline=None)
@given(worlds(2))
def test_summary_counts(world):
    """The numbers are those of the plan, executed."""
    truth, (src, dst) = world
    for pad in ("zeros", "last"):
        made = plan(src.layout(truth), dst.layout(truth), pad=pad)
        facts = summary(made)
        assert json.loads(json.dumps(facts)) == facts
        source, expected = src.arrays(truth), dst.arrays(truth, -1)
        assert facts["tensors_read"] == len(source)
        assert facts["tensors_written"] == len(expected)
        assert facts["elements_written"] == sum(array.size for array in expected.values())
        assert facts["padding_elements"] == sum(int((array == -1).sum()) for array in expected.values())
        assert facts["cut_elements"] == sum(int((array < 0).sum()) for array in source.values())
        assert facts["copies"] == sum(1 for copy in made.copies for _ in copy.instances())
        assert facts["rules"] == len(truth.rules)
        assert len(blocks(explain(made))) == 1 + facts["rules"]
    assert execute(made, source).arrays.keys() == expected.keys()
