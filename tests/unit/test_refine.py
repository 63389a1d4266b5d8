"""Finer axes in equations: the same elements, in another order."""

from __future__ import annotations

import numpy as np
import pytest

from shardtool.families.architecture import Rope
from shardtool.layout.equation import Sum, parse, parse_tensor, view
from shardtool.layout.refine import refine, unparse
from shardtool.translate.rotary import pair_sizes, row_order, separate_scaling, whole_theta

SEPARATE = "(g q d) h, (g d) h, (g d) h -> (g (q d + d + d)) h"
STACKED = "(g q d + g d + g d) h -> (g (q d + d + d)) h"
GROUPED = "(g (q d + d + d)) h -> (g (q d + d + d)) h"
SIZES = {"g": 2, "q": 2, "d": 8, "h": 3}


@pytest.mark.parametrize("text", [SEPARATE, STACKED, GROUPED])
@pytest.mark.parametrize("finer", [("half", "pair"), (Sum((("half", "pair"), ("half", "rest"))),)])
def test_queries_and_keys_alone_are_refined(text, finer):
    found = refine(parse(text), "d", finer, {0, 1})
    counts = 2 if isinstance(finer[0], Sum) else 1
    assert sum(tensor.components for tensor in found.left) == 2 * counts + 1
    assert found.text.split("->")[0].count("d") == 1  # the value's
    assert [parse_tensor(part) for part in found.text.split("->")[0].split(",")] == list(found.left)
    sizes = {**SIZES, "half": 2, "pair": 2 if counts == 2 else 4, "rest": 2}
    assert [t.shape(sizes) for t in found.left] == [t.shape(SIZES) for t in parse(text).left]


def test_components_that_share_the_axis_cannot_be_refined_apart():
    with pytest.raises(ValueError, match="share the axis d"):
        refine(parse("(g (q + 1 + 1) d) h -> (g (q d + d + d)) h"), "d", ("half", "pair"), {0, 1})
    with pytest.raises(ValueError, match="sums in two dims"):
        refine(parse("(a + b) (c + d) -> (a + b) (c + d)"), "d", ("half", "pair"), {0})


def test_text_and_back():
    for text in ("(g (q d + d + d)) h", "h (f + f)", "(1 + 1) h", "e (x + x) h", "v h"):
        assert unparse(parse_tensor(text)) == text


def rows(rope: Rope, whole: bool, dim: int = 8) -> list[list[int]]:
    """The row of each (component, half, pair) of a head of 8."""
    sizes = pair_sizes(rope, dim)
    tensor = parse_tensor("x").__class__((row_order(rope, whole),))
    found = []
    for component in range(tensor.components):
        (dims,) = view(tensor, component, sizes)
        strides = dict(dims.strides)
        inner = next(axis for axis in strides if axis != "half")
        found.append([dims.offset + half * strides["half"] + n * strides[inner]
                      for half in range(2) for n in range(sizes[inner])])  # fmt: skip
    return found


def test_order_of_a_head():
    assert rows(Rope(), False) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert rows(Rope(interleaved=True), False) == [[0, 2, 4, 6, 1, 3, 5, 7]]
    assert rows(Rope(fraction=0.5), False) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows(Rope(fraction=0.5, interleaved=True), False) == [[0, 2, 1, 3], [4, 5, 6, 7]]
    # as a whole head of halves: pair (j, j + 4), those that rotate first
    assert rows(Rope(fraction=0.5), True) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert rows(Rope(fraction=0.5, interleaved=True), True) == [[0, 2, 1, 3], [4, 6, 5, 7]]
    with pytest.raises(ValueError, match="no pairs"):
        pair_sizes(Rope(fraction=0.4), 8)


def test_frequencies_of_a_part_are_the_first_of_the_whole():
    rope = Rope(theta=50000.0, fraction=0.5)
    part = rope.theta ** -(np.arange(0, 8, 2) / 8)
    assert np.allclose(whole_theta(rope) ** -(np.arange(0, 16, 2) / 16)[:4], part, rtol=1e-12)


def test_a_scaling_stands_apart():
    from shardtool.families.registry import FAMILIES

    scaling = {"type": "yarn", "factor": 4.0}
    plain, apart = separate_scaling(
        {"rope_scaling": scaling, "rope_theta": 5.0, "max_position_embeddings": 64}, FAMILIES["qwen2"]
    )
    assert plain == {"rope_theta": 5.0, "max_position_embeddings": 64}
    assert apart == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    new = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5.0}, "max_position_embeddings": 64}
    assert separate_scaling(new, FAMILIES["qwen2"]) == (plain, apart)
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert separate_scaling(linear, FAMILIES["qwen2"]) == (linear, None)
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert separate_scaling(dynamic, FAMILIES["internlm2"]) == (dynamic, None)
