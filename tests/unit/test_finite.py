"""NaN, Inf and overflow are found by their bits, in every float dtype, as torch finds them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool.execute.finite import Passing, scan
from shardtool.formats.stored import Stored

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def stored(path: Path, tensor: torch.Tensor) -> Stored:
    path.write_bytes(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return Stored(str(path), 0, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(FLOATS), st.sampled_from(FLOATS[:4]))
def test_as_torch_finds_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, written: str
) -> None:
    kind = getattr(torch, dtype)
    raw = data.draw(st.binary(min_size=8 * kind.itemsize, max_size=8 * kind.itemsize))
    tensor = torch.frombuffer(bytearray(raw), dtype=kind)
    place = stored(tmp_path_factory.mktemp("finite") / "x", tensor)
    values = tensor.double()
    (found,) = scan([("", "w", ())], lambda _: place, {("", "w", ()): written}, jobs=1) or [None]
    nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
    beyond = int((tensor.to(getattr(torch, written)).double().isinf() & values.isfinite()).sum())
    assert ((found.nan, found.inf, found.beyond) if found else (0, 0, 0)) == (nan, inf, beyond)


def test_strided_tensors_and_many_pieces(tmp_path: Path) -> None:
    base = torch.ones(1200, 600)
    base[7, 5] = float("nan")
    base[1100, 599] = float("-inf")
    place = stored(tmp_path / "x", base)
    (found,) = scan([("f", "w", ())], lambda _: place)
    assert str(found) == "w in f: 1 NaN, 1 Inf of 720000 elements"
    column = Stored(place.file, 4 * 5, (300, 2), "float32", (2400, 600))  # rows 0, 4, 8 and 1, 5, 9: without row 7
    assert scan([("f", "w", ())], lambda _: column) == []
    column = Stored(place.file, 4 * (600 * 3 + 5), (200, 2), "float32", (2400, 600))  # has row 7
    assert [item.nan for item in scan([("f", "w", ())], lambda _: column)] == [1]


def test_integers_are_passed_over(tmp_path: Path) -> None:
    place = stored(tmp_path / "x", torch.full((4,), -1))
    assert scan([("", "w", ())], lambda _: place) == []


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(FLOATS))
def test_as_they_pass_cut_anywhere(data: st.DataObject, dtype: str) -> None:
    kind = getattr(torch, dtype)
    raw = data.draw(st.binary(min_size=8 * kind.itemsize, max_size=8 * kind.itemsize))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    passing = Passing(dtype)
    for low, high in pairwise([0, *cuts, len(raw)]):
        passing.see(memoryview(raw)[low:high])
    assert passing.found == (not bool(torch.frombuffer(bytearray(raw), dtype=kind).double().isfinite().all()))


def test_integers_pass_unseen() -> None:
    passing = Passing("int64")
    passing.see(memoryview(b"\xff" * 24))
    assert not passing.found
