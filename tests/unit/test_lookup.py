"""FP8 matrices through tables, bit by bit against a plain numpy statement: any block, part, tile and dtype."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardtool.execute import engine, lookup
from shardtool.execute import tiles as tiling
from shardtool.execute.codecs import Change, Values
from shardtool.execute.files import Files
from shardtool.execute.lookup import boxes, look_up
from shardtool.execute.tiles import Move, Workspace, fill_tile
from shardtool.formats.stored import BlockScaled, Payload, Skeleton, Stored
from shardtool.layout.codecs import CENTRED
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.megatron import Spelling, legacy_layout
from shardtool.layout.mesh import Mesh, chunks
from shardtool.layout.rules import rule
from shardtool.plan.plan import plan

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
BLOCKS = [(128, 128), (64, 32), (16, 100), (40, 28)]
SPECIAL = np.array([0.0, -0.0, 1e-42, 1e-38, 1e38, -3e38, np.inf, -np.inf, np.nan, -np.nan, 146.3], np.float32)


def number(byte: int) -> float:
    """The value of an e4m3fn byte, by its definition."""
    sign, exponent, fraction = (-1.0 if byte >> 7 else 1.0), byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.copysign(math.nan, sign)
    return sign * (fraction * 2.0**-9 if not exponent else (1 + fraction / 8) * 2.0 ** (exponent - 7))


NUMBERS = np.array([number(byte) for byte in range(256)], np.float32)


def matrix(
    folder: Path,
    shape: tuple[int, int],
    block: tuple[int, int],
    seed: int,
    scale: str = "float32",
    *,
    wild: bool = True,
) -> tuple[Stored, np.ndarray]:
    """An FP8 matrix of all bytes on disk, and its values in fp32, each the product of two numbers."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, shape, np.uint8)
    scales = rng.normal(size=[-(-size // step) for size, step in zip(shape, block, strict=True)]).astype(np.float32)
    if wild:
        scales = np.where(rng.random(scales.shape) < 0.4, rng.choice(SPECIAL, scales.shape), scales)
    else:
        data[data & 0x7F == 0x7F] = 1
    scales = scales.astype(DTYPES[scale])
    rows, columns = np.arange(shape[0])[:, None] // block[0], np.arange(shape[1]) // block[1]
    each = scales.astype(np.float32)[rows, columns]
    data[(data & 0x7F == 0x7F) & np.isnan(each)] = 1  # of two NaN numpy keeps the one or the other
    (folder / "matrix").write_bytes(b"abc" + data.tobytes() + b"d" + scales.tobytes())
    held = Stored(str(folder / "matrix"), 4 + data.size, scales.shape, scale)
    with np.errstate(all="ignore"):
        values = NUMBERS[data] * each
    return Stored(str(folder / "matrix"), 3, shape, "bfloat16", None, BlockScaled(held, *block)), values


def bits(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return values.astype(DTYPES[dtype]).view(f"u{np.dtype(DTYPES[dtype]).itemsize}")


def spread(move: Move, source: np.ndarray, target: np.ndarray) -> None:
    """The copy that a move is, one element after the other."""
    for index in np.ndindex(*move.shape):
        at = move.src_offset + sum(i * s for i, s in zip(index, move.src_strides, strict=True))
        target[move.dst_offset + sum(i * s for i, s in zip(index, move.dst_strides, strict=True))] = source[at]


@st.composite
def parts(
    draw: st.DrawFn, shape: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...], int]:
    """Shape, strides and offset in a matrix, strides in the target, and the target's size."""
    rows, width = shape
    kind = draw(st.sampled_from(["columns", "run", "groups", "transposed", "steps"]))
    if kind == "run":
        low = draw(st.integers(0, rows * width - 1))
        size = draw(st.integers(1, rows * width - low))
        return (size,), (1,), low, (1,), size
    column, row = draw(st.integers(0, width - 1)), draw(st.integers(0, rows - 1))
    columns, count = draw(st.integers(1, width - column)), draw(st.integers(1, rows - row))
    offset, gap = row * width + column, draw(st.sampled_from([0, 0, 7]))
    if kind == "columns":
        return (count, columns), (width, 1), offset, (columns + gap, 1), count * (columns + gap)
    if kind == "transposed":
        return (columns, count), (1, width), offset, (count + gap, 1), columns * (count + gap)
    if kind == "steps":
        count = -(-count // 2)
        return (count, columns), (2 * width, 1), offset, (columns + gap, 1), count * (columns + gap)
    half = max(1, count // 2)
    shape3 = (count // half, half, columns)
    return (
        shape3, (half * width, width, 1), offset, (half * (columns + gap) + 3, columns + gap, 1),
        shape3[0] * (half * (columns + gap) + 3),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(sorted(DTYPES)), block=st.sampled_from(BLOCKS), seed=st.integers(0, 99))
def test_any_part_in_any_tile(data, dtype, block, seed, tmp_path_factory):
    shape = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 300))
    stored, values = matrix(
        tmp_path_factory.mktemp("m"), shape, block, seed, data.draw(st.sampled_from(["float32", "bfloat16"]))
    )
    sizes, strides, offset, target, total = data.draw(parts(shape))
    shift = data.draw(st.integers(0, 9))
    move = Move(
        stored.file, stored.offset, stored.dtype, sizes, offset, strides, shift, target, Values(stored, None, dtype)
    )
    wanted = np.zeros(total + shift, f"u{np.dtype(DTYPES[dtype]).itemsize}")
    spread(move, bits(values, dtype).reshape(-1), wanted)
    cuts = data.draw(st.lists(st.integers(0, total + shift), max_size=4))
    edges = sorted({0, *cuts, total + shift})
    space, found = Workspace(), []
    small = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(lookup, "CHUNK", 1000)
            patch.setattr(lookup, "READ_BYTES", 3000)
            patch.setattr(lookup, "LEAST", 1)
        for low, high in pairwise(edges):
            tile = space.buffer("tile", (high - low) * wanted.itemsize)
            tile[:] = bytes(len(tile))
            fill_tile(space, [move], tile, low, dtype)
            found.append(np.frombuffer(bytes(tile), wanted.dtype))
    space.close()
    assert np.array_equal(np.concatenate(found), wanted)


@given(data=st.data(), width=st.integers(1, 12), rows=st.integers(1, 9))
def test_boxes_are_the_part(data, width, rows):
    sizes, strides, offset, target, _ = data.draw(parts((rows, width)))
    move = Move("", 0, "bfloat16", sizes, offset, strides, 2, target, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "LEAST", 1)
        found = boxes(move, width)
    if found is None:
        return
    pairs = [
        ((box.row + row) * width + box.column + column, box.target + row * box.step + column)
        for box in found
        for row in range(box.rows)
        for column in range(box.columns)
    ]
    assert all(box.column + box.columns <= width for box in found)
    wanted = [
        (
            offset + sum(i * s for i, s in zip(index, strides, strict=True)),
            2 + sum(i * s for i, s in zip(index, target, strict=True)),
        )
        for index in np.ndindex(*sizes)
    ]
    assert sorted(pairs) == sorted(wanted)


def test_what_is_looked_up(tmp_path):
    stored, _ = matrix(tmp_path, (256, 384), (128, 128), 0)
    plain = Move(stored.file, 3, "bfloat16", (256, 100), 40, (384, 1), 0, (100, 1), Values(stored, None))
    space = Workspace()
    tile = space.buffer("tile", 256 * 100 * 8)

    def taken(move: Move, dtype: str = "bfloat16") -> bool:
        return look_up(space, move, tile, 0, dtype)

    assert taken(plain)
    assert taken(plain, "float16")
    assert taken(plain, "float32")
    assert not taken(plain, "float64")
    assert not taken(plain._replace(values=None))
    assert not taken(plain._replace(values=Values(stored, Change(CENTRED, None))))
    assert not taken(plain._replace(shape=(100, 256), src_strides=(1, 384), dst_strides=(256, 1)))  # transposed
    assert not taken(plain._replace(shape=(2, 100), src_strides=(38400, 1)))  # two rows far apart
    small = Stored(stored.file, 3, (256, 384), "bfloat16", None, BlockScaled(stored, 4, 4))
    assert not taken(plain._replace(values=Values(small, None)))
    space.close()


# --- several targets -------------------------------------------------------------------------------------------------

RULES = (rule("down", "h f -> h f", "decoder.down.weight", "f"),)


@settings(max_examples=25, deadline=None)
@example(rows=700, columns=64, tp=8, dtype="bfloat16", tile=1 << 20)
@given(
    rows=st.integers(1, 300), columns=st.integers(20, 90), tp=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(sorted(DTYPES)), tile=st.sampled_from([1 << 12, 1 << 20]),
)  # fmt: skip
def test_columns_for_several_targets_are_read_once(rows, columns, tp, dtype, tile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    sizes = {"l": 1, "v": 1, "h": rows, "f": columns * tp}
    stored, values = matrix(folder, (rows, columns * tp), (32, 32), rows, wild=False)
    mesh = Mesh(tp=tp)
    target = legacy_layout(
        RULES, sizes, 1, chunks(mesh, 1), mesh, Spelling(), {(rank, 0, 0): f"rank{rank}" for rank in range(tp)}
    )
    made = plan(huggingface_layout(RULES, sizes), target)
    width = np.dtype(DTYPES[dtype]).itemsize
    size = rows * columns * width
    keys = [key for key, _ in target.tensors()]
    payloads = {key: Payload(64, (rows, columns), dtype, crc_at=(2,)) for key in keys}
    files = Files(folder, {key[0]: Skeleton(64 + size + 5, ((0, bytes(64)),), {}) for key in keys}, durable=False)
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "TILE_BYTES", tile)
        traffic = engine.write(
            [(task, task.key[0], payloads[task.key]) for task in engine.tasks(made, lambda _: dtype)], files,
            lambda _: stored, jobs=1, watch=engine.Watch(lambda task: told.append(task.key[0]), moved=False),
        )  # fmt: skip
    files.close(sync=False)
    scales = rows * tp * (columns // 32 + 2) * 4  # those of every target, anew for every row
    assert rows * columns * tp < traffic.read <= rows * columns * tp + scales
    for rank, key in enumerate(keys):
        held = np.frombuffer((folder / key[0]).read_bytes()[64 : 64 + size], f"u{width}").reshape(rows, columns)
        wanted = bits(values, dtype)[:, rank * columns : (rank + 1) * columns]
        assert np.array_equal(held, wanted)
    assert told == []


def test_no_number_in_one_targets_columns_is_told_of(tmp_path):
    sizes, tp = {"l": 1, "v": 1, "h": 64, "f": 256}, 4
    stored, _ = matrix(tmp_path, (64, 256), (32, 32), 5, wild=False)
    raw = bytearray((tmp_path / "matrix").read_bytes())
    raw[3 + 50 * 256 + 130] = 0xFF  # in the third of four
    (tmp_path / "matrix").write_bytes(raw)
    mesh = Mesh(tp=tp)
    target = legacy_layout(
        RULES, sizes, 1, chunks(mesh, 1), mesh, Spelling(), {(rank, 0, 0): f"rank{rank}" for rank in range(tp)}
    )
    keys = [key for key, _ in target.tensors()]
    files = Files(tmp_path, {key[0]: Skeleton(64 * 64 * 2, ((0, b""),), {}) for key in keys}, durable=False)
    told: list[str] = []
    made = plan(huggingface_layout(RULES, sizes), target)
    engine.write(
        [(task, task.key[0], Payload(0, (64, 64), "bfloat16")) for task in engine.tasks(made, lambda _: "bfloat16")],
        files, lambda _: stored, watch=engine.Watch(lambda task: told.append(task.key[0]), moved=False),
    )  # fmt: skip
    files.close(sync=False)
    assert told == ["rank2"]
