"""Centred tensors, products and constants against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardtool.execute.codecs import Change, Values, read_values
from shardtool.execute.tiles import Workspace
from shardtool.formats.stored import Product, Stored
from shardtool.layout.codecs import Centred, describe


@pytest.fixture
def matrix(tmp_path: Path) -> tuple[Stored, np.ndarray]:
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    (tmp_path / "matrix").write_bytes(b"xx" + values.tobytes())
    return Stored(str(tmp_path / "matrix"), 2, (7, 5), "float32"), values


def read(values: Values, low: int, count: int) -> np.ndarray:
    space = Workspace()
    try:
        return np.array(read_values(values, low, count, space.read))
    finally:
        space.close()


@pytest.mark.parametrize(("low", "count"), [(0, 35), (3, 9), (34, 1), (5, 5)])
@pytest.mark.parametrize("columns", [False, True])
def test_centred(matrix: tuple[Stored, np.ndarray], columns: bool, low: int, count: int) -> None:
    stored, values = matrix
    whole = values - values.mean(0 if columns else 1, keepdims=True, dtype=np.float64)
    found = read(Values(stored, Change(Centred(columns), None)), low, count)
    assert np.allclose(found, whole.ravel()[low : low + count], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("low", "count"), [(0, 7), (2, 3)])
def test_product(matrix: tuple[Stored, np.ndarray], tmp_path: Path, low: int, count: int) -> None:
    stored, values = matrix
    vector, bias = np.arange(5, dtype=np.float32), np.ones(7, np.float32)
    (tmp_path / "vector").write_bytes(vector.tobytes() + bias.tobytes())
    held = Stored(str(tmp_path / "vector"), 0, (5,), "float32"), Stored(str(tmp_path / "vector"), 20, (7,), "float32")
    for form, expected in (
        (Product(stored, held[0]), values @ vector),
        (Product(stored, held[0], held[1]), values @ vector + bias),
    ):
        found = read(Values(Stored(stored.file, 0, (7,), "float32", quantised=form), None), low, count)
        assert np.allclose(found, expected[low : low + count], rtol=1e-6)


def test_words() -> None:
    assert describe(Centred()) == "value = stored - the mean of its row"
    assert describe(Centred(columns=True)) == "value = stored - the mean of its column"
