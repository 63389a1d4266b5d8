"""What people call a permutation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.diff.permutations import describe, describe_copies, origins, permutation, ranges


@pytest.mark.parametrize(
    ("axis", "moved", "parts", "code", "text"),
    [
        ("g", [0, 1, 3, 2], {}, "query_groups_exchanged", "query groups 2 and 3 exchanged"),
        ("l", [2, 3, 0, 1], {"model chunk": 2}, "model_chunks_exchanged", "layers: model chunks 0 and 1 exchanged"),
        ("e", [4, 5, 6, 7, 0, 1, 2, 3], {"ep rank": 4}, "ep_ranks_exchanged", "experts: ep ranks 0 and 1 exchanged"),
        ("e", [1, 2, 3, 0], {}, "experts_rotated", "experts rotated by 1: 0 holds a's 1"),
        ("e", [3, 0, 1, 2], {}, "experts_rotated", "experts rotated by -1: 0 holds a's 3"),
        ("d", [0, 4, 1, 5, 2, 6, 3, 7], {}, "rope_interleaved", "rope rows as neighbouring pairs where a has two halves"),
        ("d", [0, 2, 4, 6, 1, 3, 5, 7], {}, "rope_halves", "rope rows as two halves where a has neighbouring pairs"),
        ("j", [0, 1, 2, 5, 3, 4], {}, "key_value_rank_and_rope_dims_permuted", None),
        ("j", [0, 1, 2, 3, 4, 6, 8, 5, 7, 9], {}, "rope_halves", None),
        ("v", [4, 3, 2, 1, 0], {}, "vocabulary_rows_reversed", "vocabulary rows in reverse order"),
        ("f", [0, 4, 1, 5, 2, 6, 3, 7], {}, "mlp_rows_interleaved", None),
        ("h", [2, 0, 1, 3, 5, 4], {}, "channels_permuted", None),
    ],
)  # fmt: skip
def test_names(axis: str, moved: list[int], parts: dict[str, int], code: str, text: str | None) -> None:
    said = describe(axis, moved, parts)
    assert said.code == code
    assert text is None or said.text == text


@given(st.permutations(range(12)))
def test_every_permutation_is_found_and_has_a_name(moved: list[int]) -> None:
    a = [f"row {index}" for index in range(12)]
    assert permutation(origins(a, [a[index] for index in moved])) == moved
    assert describe("v", moved, {}).text


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_equal_contents_stay_where_they_are(content: list[int]) -> None:
    assert origins(content, content) == list(range(len(content)))


def test_copies() -> None:
    a = list("abcdef")
    said = describe_copies("v", origins(a, list("abccde")), [3, 4, 5])
    assert said is not None and said.text == "vocabulary rows 3-5 hold a's 2-4"
    assert describe_copies("v", origins(a, list("abcxyz")), [3, 4, 5]) is None


def test_ranges() -> None:
    assert ranges([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
