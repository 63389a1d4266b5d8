"""The engine: every path from source bytes to target bytes, whatever the size of a tile and the number of threads."""

from __future__ import annotations

import ctypes
import errno
import os
import zlib
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool.checkpoint.opened import Opened
from shardtool.checkpoint.padding import cut_rows, padding_rows
from shardtool.errors import CheckpointError
from shardtool.execute import engine, tiles
from shardtool.execute import files as target_files
from shardtool.execute.checksum import combine, crc32
from shardtool.execute.numbers import numpy_dtype
from shardtool.execute.tiles import Workspace
from shardtool.families.architecture import Architecture
from shardtool.formats.stored import ITEMSIZE, Payload, Skeleton, Stored, row_major_strides
from shardtool.layout.layout import Key, Layout
from shardtool.layout.mesh import Mesh
from shardtool.plan.plan import plan
from worlds import Arrays, Place, Truth, tensors, worlds

LLAMA = Truth(Architecture("llama", 2, 6, 4, 2, 3, 8, 5, 32))
HEAD = b"before"


def values(dtype: str):
    return numpy_dtype(dtype, values=True)


def save(path: Path, arrays: Arrays, dtype: str = "float32", order: int = 0) -> dict[Key, Stored]:
    """Write arrays to one file. `order` picks the dims' order in memory and leaves a gap after every row."""
    found, data = {}, bytearray(HEAD)
    for key, array in arrays.items():
        converted = np.asarray(array).astype(values(dtype))
        strides = None
        if order and array.ndim:
            choices = list(permutations(range(array.ndim)))
            dims = choices[order % len(choices)]
            held = np.zeros([n + order % 2 for n in (converted.shape[dim] for dim in dims)], converted.dtype)
            held[tuple(slice(0, converted.shape[dim]) for dim in dims)] = converted.transpose(dims)
            steps = row_major_strides(held.shape)
            strides = tuple(steps[dims.index(dim)] for dim in range(array.ndim))
            converted = held
        found[key] = Stored(str(path), len(data), array.shape, dtype, strides)
        data += converted.tobytes()
    path.write_bytes(data)
    return found


def targets(made, dtype: str) -> tuple[dict[str, Skeleton], dict[Key, tuple[str, Payload]]]:
    """One file per file of the layout, tensors one after the other, a checksum before each."""
    files: dict[str, list] = {}
    for key, piece in tensors(made.dst):
        files.setdefault(key[0] or "all", []).append((key, made.dst.shape(piece)))
    skeletons, places = {}, {}
    for name, held in files.items():
        at, payload = len(HEAD), {}
        for key, shape in held:
            payload[key] = Payload(at + 4, shape, dtype, (at,))
            places[key] = (name, payload[key])
            at += 4 + payload[key].nbytes
        skeletons[name] = Skeleton(at, ((0, HEAD),), payload)
    return skeletons, places


def convert(made, sources: dict[Key, Stored], out: Path, dtype: str = "float32", **options) -> dict[Key, Stored]:
    """Execute a plan; the tensors written."""
    skeletons, places = targets(made, dtype)
    files = engine.Files(out, skeletons)
    work = [(task, *places[task.key]) for task in engine.tasks(made, lambda key: places[key][1].dtype)]
    try:
        engine.write(work, files, sources.__getitem__, **options)
    finally:
        files.close(sync=True)
    return {
        key: Stored(str(out / name), payload.offset, payload.shape, dtype) for key, (name, payload) in places.items()
    }


def load(stored: dict[Key, Stored]) -> Arrays:
    """Arrays of tensors in files, with the bytes' own dtype."""
    found = {}
    for key, item in stored.items():
        data = Path(item.file).read_bytes()[item.offset : item.offset + item.nbytes]
        found[key] = np.frombuffer(data, values(item.dtype)).reshape(item.shape)
    return found


def check(found: Arrays, expected: Arrays, dtype: str = "float32") -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert np.array_equal(found[key], array.astype(values(dtype))), key


@settings(max_examples=60, deadline=None)
@given(
    world=worlds(2),
    tile=st.sampled_from([1, 4, 12, 20, 64, 1 << 20]),
    factor=st.sampled_from([1, 2, 4]),
    jobs=st.integers(1, 3),
    order=st.integers(0, 5),
    pad=st.sampled_from(["zeros", "last"]),
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]),
)
def test_bytes_do_not_depend_on_tiles_or_threads(tmp_path_factory, world, tile, factor, jobs, order, pad, dtype):
    truth, (src, dst) = world
    folder = tmp_path_factory.mktemp("engine")
    made = plan(src.layout(truth), dst.layout(truth), pad=pad)
    sources = save(folder / "source", src.arrays(truth), order=order)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_BYTES", tile)
        patch.setattr(tiles, "SPAN_FACTOR", factor)
        progress = lambda count, _: seen.append(count)  # noqa: E731 - read where it stands
        found = convert(made, sources, folder / "out", dtype, jobs=jobs, progress=progress)
    check(load(found), dst.arrays(truth, 0 if pad == "zeros" else "last"), dtype)
    assert sum(seen) == sum(item.nbytes for item in found.values())
    for item in found.values():
        data = Path(item.file).read_bytes()
        assert data.startswith(HEAD)
        crc = zlib.crc32(data[item.offset : item.offset + item.nbytes])
        assert data[item.offset - 4 : item.offset] == crc.to_bytes(4, "little")


NUMBERS = [
    0.0, -0.0, 1.0, -1.0, 1 / 3, 1e-8, 1e-40, 6.1e-5, 5.96e-8, 65504.0, 65519.0, 65520.0, 1e5, 3e38, 3.4e38,
    float("inf"), float("-inf"), float("nan"),
    # halfway between two neighbours of bfloat16 and of float16: to the even one
    1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8 + 2**-20,
]  # fmt: skip


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tile", [4, 1 << 20])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_casts_are_those_of_torch(tmp_path, monkeypatch, source, target, tile):
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
    numbers = torch.tensor(NUMBERS * 5, dtype=torch.float64).to(getattr(torch, source))
    a = Architecture("llama", 1, len(numbers), 1, 1, 1, 1, 1, 1, tied=True)
    truth = Truth(a)
    arrays = {key: np.zeros(array.shape) for key, array in truth.huggingface().items()}
    sources = save(tmp_path / "source", arrays, source)
    norm = sources["", "model.norm.weight", ()]
    data = bytearray((tmp_path / "source").read_bytes())
    data[norm.offset : norm.offset + norm.nbytes] = numbers.view(torch.uint8).numpy().tobytes()
    (tmp_path / "source").write_bytes(data)
    made = plan(Place("hf").layout(truth), Place("legacy", padded=1).layout(truth))
    found = convert(made, sources, tmp_path / "out", target)
    item = found["0/0/0", "decoder.final_layernorm.weight", (0,)]
    data = Path(item.file).read_bytes()[item.offset : item.offset + item.nbytes]
    ours = torch.frombuffer(bytearray(data), dtype=getattr(torch, target))
    theirs = numbers.to(getattr(torch, target))
    assert torch.equal(ours.isnan(), theirs.isnan())
    width = ITEMSIZE[target]
    bits = {2: torch.int16, 4: torch.int32}[width]
    assert torch.equal(ours.view(bits)[~ours.isnan()], theirs.view(bits)[~theirs.isnan()])


@pytest.mark.parametrize("tile", [1, 4, 20, 1 << 20])
def test_padding_with_a_given_row(tmp_path, monkeypatch, tile):
    """A row of bytes for the padding, which tiles cut anywhere."""
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
    place = Place("legacy", Mesh(tp=2), padded=12)
    made = plan(Place("hf").layout(LLAMA), place.layout(LLAMA), pad="mean")
    row = np.arange(-6, 0, dtype=np.float32)
    fills = {
        key: row.tobytes() for key, _ in tensors(made.dst) if key[1].endswith(("embeddings.weight", "layer.weight"))
    }
    found = load(convert(made, save(tmp_path / "source", LLAMA.huggingface()), tmp_path / "out", fills=fills))
    embedding = found["1/0/0", "embedding.word_embeddings.weight", (0,)]
    assert np.array_equal(embedding, np.repeat(row[None], 6, axis=0))
    first = found["0/0/0", "embedding.word_embeddings.weight", (0,)]
    assert np.array_equal(first[:5], LLAMA.weights[0]["embedding"])
    assert np.array_equal(first[5], row)


def opened(layout: Layout, stored: dict[Key, Stored]) -> Opened:
    return Opened(Path(), LLAMA.a, layout, {}, stored.__getitem__)


@pytest.mark.parametrize("tile", [20, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_row(tmp_path, monkeypatch, tile, dtype):
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
    truth = Truth(Architecture("llama", 1, 6, 4, 2, 3, 8, 5, 32, tied=True))
    place = Place("legacy", Mesh(tp=2, pp=2, pipeline_layout="Et|L"), padded=8)
    made = plan(Place("hf").layout(truth), place.layout(truth), pad="mean")
    stored = save(tmp_path / "source", truth.huggingface())
    _, places = targets(made, dtype)
    work = [(task, *places[task.key]) for task in engine.tasks(made, lambda key: places[key][1].dtype)]
    rows = padding_rows(made, opened(made.src, stored), work)
    mean = torch.tensor(truth.weights[0]["embedding"]).double().mean(0).float().to(getattr(torch, dtype))
    # the tied copy on the last stage is padded like the embedding; tp rank 0 has no padding
    assert set(rows) == {
        ("1/0/0", "embedding.word_embeddings.weight", (0,)),
        ("1/1/0", "output_layer.weight", (0,)),
    }
    for row in rows.values():
        assert row == mean.view(torch.uint8).numpy().tobytes()
    assert padding_rows(plan(made.src, made.dst), opened(made.src, stored), work) == {}


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        (lambda rows: rows * 0, 0),
        (lambda rows: rows * 0 + 4, 0),
        (lambda rows: np.repeat(np.arange(6.0)[None], len(rows), axis=0), 0),
        (lambda rows: np.arange(rows.size).reshape(rows.shape), 2),
    ],
)
def test_what_is_said_of_padding_that_is_cut(tmp_path, change, notes):
    place = Place("legacy", Mesh(tp=2), padded=12)
    made = plan(place.layout(LLAMA), Place("hf").layout(LLAMA))
    arrays = place.arrays(LLAMA, 0)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = np.concatenate([arrays[f"{rank}/0/0", name, (0,)] for rank in (0, 1)]).astype(float)
        whole[5:] = change(whole[5:])
        arrays |= {(f"{rank}/0/0", name, (0,)): whole[6 * rank : 6 * rank + 6] for rank in (0, 1)}
    found = cut_rows(made, opened(made.src, save(tmp_path / "source", arrays)))
    assert len(found) == notes
    assert all("7 padding rows of " in note for note in found)


# ---------------------------------------------------------------------------------------------------------------------
# failures


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_source_that_is_cut_short(tmp_path, jobs, dtype):
    made = plan(Place("hf").layout(LLAMA), Place("legacy", Mesh(tp=2), padded=6).layout(LLAMA))
    sources = save(tmp_path / "source", LLAMA.huggingface())
    size = (tmp_path / "source").stat().st_size
    os.truncate(tmp_path / "source", size - 8)
    with pytest.raises(CheckpointError, match="is cut off") as error:
        convert(made, sources, tmp_path / "out", dtype, jobs=jobs)
    assert error.value.expected == f"at least {size} bytes"
    assert error.value.found == f"{size - 8} bytes"
    assert error.value.where == str(tmp_path / "source")


def test_a_source_that_is_gone(tmp_path):
    made = plan(Place("hf").layout(LLAMA), Place("hf").layout(LLAMA))
    sources = save(tmp_path / "source", LLAMA.huggingface())
    (tmp_path / "source").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(made, sources, tmp_path / "out")


def test_a_target_file_that_exists_is_not_touched(tmp_path):
    (tmp_path / "all").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        engine.Files(tmp_path, {"all": Skeleton(3, ((0, b"new"),))})
    assert (tmp_path / "all").read_bytes() == b"old"


@pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(target_files, "_fallocate", refuse if code else None)
    files = engine.Files(tmp_path, {"sub/a": Skeleton(10, ((2, b"xy"),)), "empty": Skeleton(0, ())})
    files.write("sub/a", b"z", 9)
    files.close(sync=True)
    assert (tmp_path / "sub" / "a").read_bytes() == b"\0\0xy\0\0\0\0\0z"
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_full_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(target_files, "_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        engine.Files(tmp_path, {"a": Skeleton(10, ((0, b"xy"),))})


@pytest.mark.parametrize("durable", [True, False])
def test_more_files_than_descriptors(tmp_path, monkeypatch, durable):
    """Files that are not open any more are opened again; what waits for the end is written then."""
    monkeypatch.setattr(target_files, "OPEN_FILES", 1)
    skeletons = {name: Skeleton(6, ((0, b"<"), (5, b">"))) for name in "abc"}
    files = engine.Files(tmp_path, skeletons, durable=durable)
    for name in "cab":
        files.write(name, name.encode() * 4, 1)
    files.finish("b")
    files.close(sync=True)
    assert [(tmp_path / name).read_bytes() for name in "abc"] == [b"<aaaa>", b"<bbbb>", b"<cccc>"]


def test_a_failed_sync_is_an_error(tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "the device is gone")

    files = engine.Files(tmp_path, {"a": Skeleton(1, ((0, b"x"),))})
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="device is gone"):
        files.close(sync=True)


def test_files_of_a_run_that_failed_are_closed(tmp_path):
    files = engine.Files(tmp_path, {"a": Skeleton(2, ((0, b"x"), (1, b"y")))})
    files.close(sync=False)
    assert (tmp_path / "a").read_bytes() == b"x\0"


def test_a_short_write_goes_on(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:2], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, data, at: real(fd, b"".join(data)[:3], at))
    files = engine.Files(tmp_path, {"a": Skeleton(12, ((0, b"abcdefg"),))})
    files.write_both("a", memoryview(b"hi"), bytearray(b"jkl"), 7)
    files.close(sync=False)
    assert (tmp_path / "a").read_bytes() == b"abcdefghijkl"


def test_a_short_read_goes_on(tmp_path, monkeypatch):
    """One preadv over many pieces, of which the kernel fills only some, and more pieces than it takes at once."""
    (tmp_path / "a").write_bytes(bytes(range(100)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:7]], at))
    monkeypatch.setattr(tiles, "IOV_MAX", 3)
    space = Workspace()
    views = [memoryview(bytearray(size)) for size in (5, 9, 1, 20, 30)]
    space.read_rows(str(tmp_path / "a"), 10, views, 65)
    assert b"".join(views) == bytes(range(10, 75))
    with pytest.raises(CheckpointError, match="is cut off"):
        space.read_rows(str(tmp_path / "a"), 60, views, 65)
    space.close()


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_checksums_of_parts(parts):
    whole, crc = b"".join(parts), 0
    for part in parts:
        crc = combine(crc, zlib.crc32(part), len(part))
    assert crc == zlib.crc32(whole) == crc32(whole)


# ---------------------------------------------------------------------------------------------------------------------
# comparison


@settings(max_examples=60, deadline=None)
@given(world=worlds(2), tile=st.sampled_from([1, 4, 20, 1 << 20]), data=st.data())
def test_compare_finds_what_differs(tmp_path_factory, world, tile, data):
    """Equal where it is equal; planted differences are found, counted and located; padding is not looked at."""
    truth, (dst, src) = world  # the one that may have any chunks is the one to compare with
    folder = tmp_path_factory.mktemp("compare")
    made = plan(src.layout(truth), dst.layout(truth))
    sources = save(folder / "source", src.arrays(truth))
    arrays = {key: np.array(array, np.float32, order="C") for key, array in dst.arrays(truth, -1).items()}
    real = sum(int((array != -1).sum()) for array in arrays.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_BYTES", tile)
        held = save(folder / "target", arrays)
        assert engine.compare(made, sources.__getitem__, held.__getitem__) == (real, [])
        name = data.draw(st.sampled_from(sorted(key for key, array in arrays.items() if (array != -1).any())))
        flat = arrays[name].reshape(-1)
        places = np.flatnonzero(flat != -1)
        chosen = sorted(data.draw(st.sets(st.sampled_from(places.tolist()), min_size=1, max_size=4)))
        flat[chosen] += 0.5
        held = save(folder / "target", arrays)
        seen: list[int] = []
        found = engine.compare(
            made, sources.__getitem__, held.__getitem__, progress=lambda count, _: seen.append(count)
        )
    assert found == (real, [engine.Difference(name, len(chosen), chosen[0], len(places))])
    assert sum(seen) == sum(array.nbytes for array in arrays.values())


def test_compare_looks_at_bits(tmp_path):
    """-0.0 is not 0.0, and a NaN is equal to itself."""
    layout = Place("hf").layout(LLAMA)
    made = plan(layout, layout)
    arrays = {key: np.array(array, np.float32) for key, array in LLAMA.huggingface().items()}
    norm = arrays["", "model.norm.weight", ()]
    norm[:2] = np.nan, 0.0
    ours = save(tmp_path / "a", arrays)
    norm[1] = -0.0
    theirs = save(tmp_path / "b", arrays)
    _, (found,) = engine.compare(made, ours.__getitem__, theirs.__getitem__)
    assert (found.key[1], found.elements, found.first) == ("model.norm.weight", 1, 1)


def test_compare_with_a_target_that_is_not_row_major(tmp_path):
    layout = Place("hf").layout(LLAMA)
    stored = save(tmp_path / "a", LLAMA.huggingface(), order=1)
    compared, differences = engine.compare(plan(layout, layout), stored.__getitem__, stored.__getitem__)
    assert (compared, differences) == (sum(array.size for array in LLAMA.huggingface().values()), [])


# ---------------------------------------------------------------------------------------------------------------------
# parts


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_clipped_copies_are_the_copy(data):
    """The parts of a copy that fall into tiles are all of it, and nothing twice."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    steps, width = [], 1
    for size in reversed(shape):
        steps.append(width + data.draw(st.integers(0, 2)))
        width += steps[-1] * (size - 1)
    offset, step = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
    strides = tuple(reversed(steps))
    move = tiles.Move("f", 0, "float32", shape, 7, tuple(n * 2 for n in strides), offset, strides)

    def pairs(item: tiles.Move) -> list[tuple[int, int]]:
        return [
            (
                item.src_offset + sum(i * s for i, s in zip(index, item.src_strides, strict=True)),
                item.dst_offset + sum(i * s for i, s in zip(index, item.dst_strides, strict=True)),
            )
            for index in np.ndindex(*item.shape)
        ]

    merged = tiles.coalesce(move)
    assert sorted(pairs(merged)) == sorted(pairs(move))
    parts = [
        pair
        for low in range(0, offset + width + step, step)
        for part in tiles.clip(merged, low, low + step)
        for pair in pairs(part)
        if low <= pair[1] < low + step
    ]
    assert sorted(parts) == sorted(pairs(move))


def test_coalesced_copies_are_short():
    move = tiles.Move("f", 0, "float32", (2, 1, 3, 4), 0, (24, 99, 4, 1), 0, (12, 77, 4, 1))
    assert tiles.coalesce(move).shape == (2, 12)


def test_dtypes():
    assert numpy_dtype("bfloat16", values=False) == np.dtype("u2")
    assert numpy_dtype("bool", values=True) == np.dtype(bool)
    assert numpy_dtype("float8_e4m3fn", values=True).itemsize == 1
    for name, width in ITEMSIZE.items():
        assert numpy_dtype(name, values=True).itemsize == width


def test_a_workspace_reuses_its_buffers():
    space = Workspace()
    large = space.buffer("tile", 100)
    assert np.shares_memory(space.buffer("tile", 10), large)
    assert len(space.buffer("tile", 10)) == 10
    assert len(space.buffer("span", 200)) == 200
