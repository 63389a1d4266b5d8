"""torch.save archives: torch's are read bit for bit, ours are what torch.save writes, and lies are refused."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config as torch_config

from filled import content, dtype_name, load, same, sample, write
from shardtool.errors import CheckpointError
from shardtool.formats import torch_zip, torch_zip_out
from shardtool.formats.inert import DType, TensorRef
from shardtool.formats.pickle_out import TensorOut
from shardtool.formats.stored import ITEMSIZE

torch.serialization.add_safe_globals([Namespace])

STATE = OrderedDict(
    (f"{dtype}.{'x'.join(map(str, shape)) or 'scalar'}", sample(shape, dtype))
    for dtype in ITEMSIZE
    for shape in [(2, 3), (), (0,), (1, 2, 1, 2)]
)
SETTINGS = {
    "n": None,
    "b": True,
    "i": [1, 255, 256, 65536, -1, 2**31, -(2**40)],
    "f": 1e-6,
    "t": (1, (2,), ()),
    "ü": "é",
}


def ours(root_of: dict[str, Any], path: Path, state: dict[str, torch.Tensor]) -> Path:
    model = OrderedDict((name, TensorOut((0, name), dtype_name(t), tuple(t.shape))) for name, t in state.items())
    skeleton = torch_zip_out.skeleton({**root_of, "model": model})
    return write(skeleton, path, lambda key: content(state[key[1]]))  # type: ignore[index]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_writes(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    torch.save({"args": Namespace(a=1), "model": STATE}, path, pickle_protocol=protocol)
    file = torch_zip.read(path)
    assert isinstance(file.root, dict)
    for name, tensor in STATE.items():
        stored = torch_zip.stored_tensor(file, file.root["model"][name], name)
        assert stored.strides is None and same(load(stored), tensor)


def test_reads_an_archive_inside_a_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(STATE["float32.2x3"], buffer)
    path = tmp_path / "x.distcp"
    path.write_bytes(b"x" * 1234 + buffer.getvalue() + b"y" * 99)
    file = torch_zip.read(path, 1234, len(buffer.getvalue()))
    assert isinstance(file.root, TensorRef)
    assert same(load(torch_zip.stored_tensor(file, file.root)), STATE["float32.2x3"])
    for offset, length in ((1233, len(buffer.getvalue())), (1234, len(buffer.getvalue()) + 1), (1234, 10**6), (-1, 5)):
        with pytest.raises(CheckpointError):
            torch_zip.read(path, offset, length)


def test_views_parameters_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(base + 1)
    parameter.sequence_parallel = True  # type: ignore[attr-defined]  # Megatron marks its parameters like this
    state = {
        "base": base, "slice": base[1:, 2:4], "transposed": base.t(), "column": base[:, 1], "parameter": parameter,
        "buffer": torch.nn.Buffer(base + 2), "one": base[:1, 1:2],
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    file = torch_zip.read(tmp_path / "x.pt")
    assert isinstance(file.root, dict)
    stored = {name: torch_zip.stored_tensor(file, file.root[name], name) for name in state}
    assert all(same(load(stored[name]), tensor.detach().contiguous()) for name, tensor in state.items())
    assert stored["base"].strides is None and stored["transposed"].strides == (1, 6)
    assert stored["one"].strides is None  # the strides of axes of size 1 say nothing
    assert stored["slice"].offset == stored["base"].offset + 8 * 4


def test_a_tensor_with_more_elements_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(3, 2)}, tmp_path / "x.pt")
    file = torch_zip.read(tmp_path / "x.pt")
    assert isinstance(file.root, dict)
    with pytest.raises(CheckpointError, match=r"more elements than its storage\n  where: .*x\.pt: w"):
        torch_zip.stored_tensor(file, file.root["w"], "w")


def test_torch_reads_ours_in_every_mode(tmp_path: Path) -> None:
    path = ours({"args": Namespace(dtype=DType("bfloat16"), **SETTINGS)}, tmp_path / "x.pt", STATE)
    modes: list[dict[str, Any]] = [{}, {"weights_only": False}, {"mmap": True}, {"mmap": True, "weights_only": False}]
    for mode in modes:
        loaded = torch.load(path, **mode)
        assert loaded["args"] == Namespace(dtype=torch.bfloat16, **SETTINGS)
        assert list(loaded["model"]) == list(STATE) and isinstance(loaded["model"], OrderedDict)
        assert all(same(loaded["model"][name], STATE[name]) for name in STATE)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tqq", str(path)], check=True)


def test_torch_computes_our_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch then asserts that every storage lies where its own writer would have put it
    path = ours({}, tmp_path / "x.pt", STATE)
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with torch_config.patch({"load.calculate_storage_offsets": True}):
        loaded = torch.load(path, mmap=True)
    assert all(same(loaded["model"][name], STATE[name]) for name in STATE)


def test_our_layout_is_torchs_byte_for_byte(tmp_path: Path) -> None:
    torch.save({"args": Namespace(**SETTINGS), "model": STATE}, tmp_path / "model.pt")
    theirs = (tmp_path / "model.pt").read_bytes()
    records, tensors = [], iter(STATE.values())
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                tensor = next(tensors)
                out = TensorOut(info.filename, dtype_name(tensor), tuple(tensor.shape))
                records.append(torch_zip_out._Record(info.filename.encode(), tensor=out))
            else:
                records.append(torch_zip_out._Record(info.filename.encode(), archive.read(info)))
    payload = {f"model/data/{i}": content(tensor) for i, tensor in enumerate(STATE.values())}
    assert torch_zip_out.fill(torch_zip_out._layout(records), payload) == theirs


def test_the_layout_beyond_4_gib_is_torchs(tmp_path: Path) -> None:
    # sparse files: nothing of this size is written
    gib = 1 << 30
    shapes = {"small": (64,), "large": (5 * gib,), "after": (64,), "more": (3,)}
    with torch.serialization.skip_data():
        torch.save(
            {name: torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items()}, tmp_path / "their.pt"
        )
    with (tmp_path / "their.pt").open("rb") as file, zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        records, names = [], iter(shapes)
        for info in infos:
            if "/data/" in info.filename:
                name = next(names)
                records.append(
                    torch_zip_out._Record(info.filename.encode(), tensor=TensorOut(name, "uint8", shapes[name]))
                )
            else:
                records.append(torch_zip_out._Record(info.filename.encode(), archive.read(info)))
        skeleton = torch_zip_out._layout(records)
        assert skeleton.size == os.fstat(file.fileno()).st_size
        crc = {position for place in skeleton.payload.values() for at in place.crc_at for position in range(at, at + 4)}
        for position, part in skeleton.parts:
            file.seek(position)
            theirs = bytearray(file.read(len(part)))
            for at in crc & set(range(position, position + len(part))):
                theirs[at - position] = 0  # torch writes CRCs of data that it skipped
            assert part == bytes(theirs)
    model = OrderedDict((name, TensorOut(name, "uint8", shape)) for name, shape in shapes.items())
    skeleton = torch_zip_out.skeleton(model)
    with (tmp_path / "our.pt").open("wb") as out:
        out.truncate(skeleton.size)
        for position, part in skeleton.parts:
            os.pwrite(out.fileno(), part, position)
        os.pwrite(out.fileno(), b"abc", skeleton.payload["more"].offset)
    assert bytes(torch.load(tmp_path / "our.pt", mmap=True)["more"].numpy()) == b"abc"
    file_ = torch_zip.read(tmp_path / "our.pt")
    assert isinstance(file_.root, dict)
    stored = torch_zip.stored_tensor(file_, file_.root["more"])
    assert stored.offset == skeleton.payload["more"].offset > 5 * gib


def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(65_540)]
    skeleton = torch_zip_out.skeleton({name: TensorOut(name, "bfloat16", (0,)) for name in names})
    path = write(skeleton, tmp_path / "x.pt", lambda _: b"")
    reader = torch._C.PyTorchFileReader(str(path))
    assert len(reader.get_all_records()) == len(names) + 6
    file = torch_zip.read(path)
    assert isinstance(file.root, dict) and list(file.root) == names
    assert file.records["data/65539"] == (reader.get_record_offset("data/65539"), 0)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=80),
        st.tuples(st.lists(st.integers(0, 5), max_size=5), st.sampled_from(sorted(ITEMSIZE))),
        max_size=8,
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[list[int], str]]) -> None:
    state = {name: sample(tuple(shape), dtype) for name, (shape, dtype) in specs.items()}
    path = ours({"x": 1}, tmp_path_factory.mktemp("zip") / "x.pt", state)
    file = torch_zip.read(path)
    loaded = torch.load(path)["model"]
    assert isinstance(file.root, dict) and file.root["model"].keys() == state.keys() == loaded.keys()
    for name, tensor in state.items():
        stored = torch_zip.stored_tensor(file, file.root["model"][name])
        assert same(load(stored), tensor) and same(loaded[name], tensor)
        assert loaded[name].stride() == tensor.stride()
        if tensor.numel():
            assert stored.offset % 64 == 0


def test_dumps_small_objects() -> None:
    for value in ({"a": 1, "raw": b"\x00\xff", "set": {1, 2}}, [None], [1, [2, (3, "x")], {}], (1, 2, 3, 4)):
        assert torch.load(io.BytesIO(torch_zip_out.dumps(value))) == value
    empty = torch.load(io.BytesIO(torch_zip_out.dumps([TensorOut(None, "uint8", (0,))])))
    assert len(empty) == 1 and same(empty[0], torch.empty(0, dtype=torch.uint8))
    tensor = sample((3,), "bfloat16")
    loaded = torch.load(io.BytesIO(torch_zip_out.dumps(TensorOut("k", "bfloat16", (3,)), {"k": content(tensor)})))
    assert same(loaded, tensor)
    with pytest.raises(ValueError, match="has 0 bytes instead of 6"):
        torch_zip_out.dumps(TensorOut("k", "bfloat16", (3,)))
    with pytest.raises(TypeError, match="Path has no place"):
        torch_zip_out.dumps({"a": Path("x")})
    with pytest.raises(TypeError, match="two tensors"):
        torch_zip_out.dumps([TensorOut("k", "uint8", (0,)), TensorOut("k", "int8", (0,))])


def test_the_same_key_is_the_same_storage(tmp_path: Path) -> None:
    tied = TensorOut("w", "float32", (2,))
    skeleton = torch_zip_out.skeleton({"a": tied, "b": TensorOut("v", "float32", (1,)), "c": tied})
    path = write(skeleton, tmp_path / "x.pt", lambda key: content(torch.ones(2 if key == "w" else 1)))
    loaded = torch.load(path)
    assert loaded["a"].data_ptr() == loaded["c"].data_ptr() != loaded["b"].data_ptr()


def test_the_bytes_are_a_function_of_the_arguments() -> None:
    root = {"model": OrderedDict(a=TensorOut("a", "float32", (2,)))}
    assert torch_zip_out.skeleton(root) == torch_zip_out.skeleton(root)


# --- archives that lie -----------------------------------------------------------------------------------------------


def archive() -> bytearray:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": torch.ones(3)}, buffer)
    return bytearray(buffer.getvalue())


def refused(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "bad.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        file = torch_zip.read(path)
        assert isinstance(file.root, dict)
        for tensor in file.root.values():
            torch_zip.stored_tensor(file, tensor)
    assert "bad.pt" in str(error.value)
    return str(error.value)


def test_truncated_at_every_length(tmp_path: Path) -> None:
    data = archive()
    for length in range(0, len(data), 7):
        refused(tmp_path, bytes(data[:length]))


def test_other_formats_are_named(tmp_path: Path) -> None:
    assert "an empty file" in refused(tmp_path, b"")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "torch.save of torch 1.6 or later" in refused(tmp_path, (tmp_path / "old.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("x/readme.txt", "hello")
    assert "data.pkl" in refused(tmp_path, (tmp_path / "other.zip").read_bytes())
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "script.pt"))
    assert "TorchScript" in refused(tmp_path, (tmp_path / "script.pt").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be read"):
        torch_zip.read(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="in the place of a file"):
        torch_zip.read(tmp_path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    source = zipfile.ZipFile(io.BytesIO(archive()))
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name in source.namelist():
            file.writestr(name, source.read(name))
    assert "compressed" in refused(tmp_path, (tmp_path / "z.pt").read_bytes())


def test_a_repacked_archive_and_a_comment_are_read(tmp_path: Path) -> None:
    source = zipfile.ZipFile(io.BytesIO(archive()))
    path = tmp_path / "z.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.comment = b"repacked" * 1000
        for name in source.namelist():
            file.writestr(name, source.read(name))
    made = torch_zip.read(path)
    assert isinstance(made.root, dict)
    assert same(load(torch_zip.stored_tensor(made, made.root["a"])), torch.arange(4.0))


def test_big_endian_is_refused(tmp_path: Path) -> None:
    data = archive().replace(b"little", b"big\0\0\0")
    assert "big-endian" in refused(tmp_path, bytes(data))


def central(data: bytes, name: bytes) -> int:
    """Where the directory's entry of a record begins."""
    return data.rindex(name) - 46


def test_records_that_overlap_or_leave_the_file(tmp_path: Path) -> None:
    data = archive()
    shifted = bytearray(data)
    # data/1 points to the header of data/0
    at, other = central(data, b"archive/data/1"), central(data, b"archive/data/0")
    shifted[at + 42 : at + 46] = data[other + 42 : other + 46]
    assert "overlap" in refused(tmp_path, bytes(shifted))
    for size in (2**31, 2**32 - 2):
        grown = bytearray(data)
        grown[other + 20 : other + 28] = struct.pack("<LL", size, size)
        assert "out of place" in refused(tmp_path, bytes(grown))
    far = bytearray(data)
    far[other + 42 : other + 46] = struct.pack("<L", len(data) - 10)
    assert "beyond the end" in refused(tmp_path, bytes(far))


def test_a_payload_of_another_size_than_its_tensor(tmp_path: Path) -> None:
    data = archive()
    at = central(data, b"archive/data/0")
    data[at + 20 : at + 28] = struct.pack("<LL", 8, 8)
    assert "wrong size" in refused(tmp_path, bytes(data))


def test_directories_that_lie_about_their_size(tmp_path: Path) -> None:
    for field, value in ((32, 2**40), (40, 2**40), (48, 2**40), (32, 1)):
        data = archive()
        end = data.rindex(b"PK\x06\x06")
        data[end + field : end + field + 8] = struct.pack("<Q", value)
        refused(tmp_path, bytes(data))


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_is_a_value_or_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    data = archive()
    data[at % len(data)] = byte
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    path.write_bytes(data)
    try:
        file = torch_zip.read(path)
        for tensor in file.root.values() if isinstance(file.root, dict) else ():
            if isinstance(tensor, TensorRef):
                stored = torch_zip.stored_tensor(file, tensor)
                assert 0 <= stored.offset <= len(data) - stored.nbytes
    except CheckpointError:
        pass


def tensor_pickle(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, numel: int) -> bytes:
    from shardtool.formats import pickle_out

    def ints(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(pickle_out.integer, values)) + b"t"

    head = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    )
    head += b"X\x03\x00\x00\x00cpu" + pickle_out.integer(numel) + b"tQ" + pickle_out.integer(offset)
    return head + ints(shape) + ints(strides) + b"\x89}tR."


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "numel"),
    [
        ((5,), (1,), 0, 4), ((4,), (1,), 1, 4), ((2, 2), (4, 1), 0, 4), ((2**40,), (1,), 0, 4), ((4,), (2**60,), 0, 4),
        ((4,), (1,), 0, 5), ((2**40, 2**40), (1, 1), 0, 4), ((-1,), (1,), 0, 4), ((4,), (-1,), 3, 4),
        ((4,), (1, 1), 0, 4), ((4,), (1,), -1, 4), ((4,), (1,), 0, 2**62),
    ],
)  # fmt: skip
def test_tensors_that_leave_their_storage(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, numel: int
) -> None:
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", tensor_pickle(shape, strides, offset, numel))
        file.writestr("x/data/0", bytes(16))
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        made = torch_zip.read(path)
        assert isinstance(made.root, TensorRef)
        torch_zip.stored_tensor(made, made.root)


def test_a_tensor_without_its_payload(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", tensor_pickle((4,), (1,), 0, 4))
    made = torch_zip.read(path)
    assert isinstance(made.root, TensorRef)
    with pytest.raises(CheckpointError, match="payload is missing"):
        torch_zip.stored_tensor(made, made.root, "w")


def test_dtypes_that_are_not_supported(tmp_path: Path) -> None:
    torch.save(torch.ones(2, dtype=torch.complex64), tmp_path / "x.pt")
    made = torch_zip.read(tmp_path / "x.pt")
    assert isinstance(made.root, TensorRef)
    with pytest.raises(CheckpointError, match="complex64"):
        torch_zip.stored_tensor(made, made.root, "w")


def test_crc_of_the_records_without_payload() -> None:
    skeleton = torch_zip_out.skeleton({"a": 1})
    data = torch_zip_out.fill(skeleton, {})
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        assert zlib.crc32(zipfile.ZipFile(io.BytesIO(data)).read(info)) == info.CRC
