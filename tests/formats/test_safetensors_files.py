"""safetensors headers: what safetensors writes is read, what we lay out safetensors reads, and lies are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from filled import content, dtype_name, load, same, sample, write
from shardtool.errors import CheckpointError
from shardtool.formats.hf_index import read_index
from shardtool.formats.safetensors_files import (
    DTYPES,
    index_json,
    read_checkpoint,
    read_header,
    shard_names,
    skeleton,
    split_by_size,
)

STATE = {
    "b.weight": sample((3, 5), "bfloat16"),
    "a.weight": sample((2, 3), "float32"),
    "scale": sample((), "float32"),
    "empty": sample((0, 4), "float16"),
    "mask": sample((7,), "bool"),
    "fp8": sample((4, 2), "float8_e4m3fn"),
}


def raw(path: Path, header: dict[str, Any] | str, payload: int) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(payload))
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(STATE, path, metadata={"format": "pt"})
    tensors, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert tensors.keys() == STATE.keys()
    assert all(same(load(tensors[name]), STATE[name]) for name in STATE)


def test_safetensors_reads_what_we_lay_out(tmp_path: Path) -> None:
    specs = [(name, tuple(tensor.shape), dtype_name(tensor)) for name, tensor in STATE.items()]
    path = write(skeleton(specs), tmp_path / "x.safetensors", lambda name: content(STATE[str(name)]))
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == STATE.keys()
    assert all(same(loaded[name], STATE[name]) for name in STATE)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_same_bytes_as_safetensors_for_one_dtype(tmp_path: Path) -> None:
    state = {name: sample((4, 3), "bfloat16") for name in ("a", "b.ü", "c")}
    safetensors.torch.save_file(state, tmp_path / "theirs", metadata={"format": "pt"})
    specs = [(name, (4, 3), "bfloat16") for name in state]
    ours = write(skeleton(specs), tmp_path / "ours", lambda name: content(state[str(name)]))
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(DTYPES.values()))),
        max_size=6,
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[list[int], str]]) -> None:
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    layout = skeleton([(name, tuple(shape), dtype) for name, (shape, dtype) in specs.items()], {})
    write(layout, path, lambda key: bytes(layout.payload[key].nbytes))
    tensors, metadata = read_header(path)
    assert metadata == {}
    assert {name: (list(t.shape), t.dtype) for name, t in tensors.items()} == specs
    assert all(tensors[name].offset == layout.payload[name].offset for name in specs)
    assert all(place.offset % torch.empty((), dtype=getattr(torch, place.dtype)).element_size() == 0
               for place in layout.payload.values())  # fmt: skip


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        skeleton([("a", (1,), "float32"), ("a", (2,), "float32")])


BROKEN = {
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "overlap"),
    "hole": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20, "belong to no tensor"),
    "bytes at the end": ({"a": entry(0, 8, [2])}, 9, "belong to no tensor"),
    "size": ({"a": entry(0, 12, [2])}, 12, "do not fit its shape"),
    "backwards": ({"a": entry(8, 0, [2])}, 8, "end before they begin"),
    "dtype": ({"a": entry(0, 8, [2], "F6_E3M2")}, 8, "not supported"),
    "negative": ({"a": entry(0, 8, [-2])}, 8, "header is damaged"),
    "fraction": ({"a": entry(0, 8, [2.0])}, 8, "header is damaged"),  # type: ignore[list-item]
    "truth as size": ({"a": entry(0, 4, [True])}, 4, "header is damaged"),
    "huge": ({"a": entry(0, 8, [2**62, 2**62])}, 8, "do not fit its shape"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "header is damaged"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "header is damaged"),
    "twice": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', 4, "occurs twice"),
    "no json": ("{nonsense", 0, "cannot be read"),
    "deep json": ("{" + '"a":[' * 50000, 0, "cannot be read"),
    "list": ("[]", 0, "does not begin"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(tmp_path: Path, case: str) -> None:
    header, payload, message = BROKEN[case]
    path = raw(tmp_path / "x.safetensors", header, payload)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert message in str(error.value) and "x.safetensors" in str(error.value)


def test_truncated_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"first": torch.ones(4), "second": torch.ones(8)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(path)
    path.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=r"cut off\n.*x\.safetensors: second"):
        read_header(path)


def test_a_header_length_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="header of 9223372036854775808 bytes"):
        read_header(path)


# --- sharded checkpoints ---------------------------------------------------------------------------------------------


def sharded(root: Path, weight_map: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file({"a": torch.ones(2)}, root / "model-00001-of-00002.safetensors")
    safetensors.torch.save_file({"b": torch.ones(3), "c": torch.ones(1)}, root / "model-00002-of-00002.safetensors")
    names = ("a", "model-00001-of-00002.safetensors"), *((n, "model-00002-of-00002.safetensors") for n in "bc")
    (root / "model.safetensors.index.json").write_bytes(index_json(weight_map or dict(names), 24, 6))
    return root


def test_reads_shards(tmp_path: Path) -> None:
    tensors = read_checkpoint(sharded(tmp_path))
    assert [(name, t.shape) for name, t in tensors.items()] == [("a", (2,)), ("b", (3,)), ("c", (1,))]


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", "sub\\x.safetensors"],
)
def test_an_index_cannot_leave_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "ckpt" / "sub").mkdir(parents=True)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "evil.safetensors")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "ckpt" / "sub" / "x.safetensors")
    with pytest.raises(CheckpointError, match="outside of its directory"):
        read_checkpoint(sharded(tmp_path / "ckpt", {"a": name}))


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "ckpt" / "model.safetensors").symlink_to("../other.safetensors")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        read_checkpoint(tmp_path / "ckpt")


def test_the_hub_cache_is_links_and_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "models--x" / "blobs" / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert list(read_checkpoint(snapshot)) == ["a"]


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    with pytest.raises(CheckpointError, match="lacks tensors that the index places there"):
        read_checkpoint(sharded(tmp_path, {"a": first, "b": second, "c": second, "d": second}))
    with pytest.raises(CheckpointError, match="does not place there"):
        read_checkpoint(sharded(tmp_path, {"a": first, "b": second}))
    with pytest.raises(CheckpointError, match="missing"):
        read_checkpoint(sharded(tmp_path, {"a": "model-00003-of-00002.safetensors"}))
    with pytest.raises(CheckpointError, match="names no file for a tensor"):
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="occurs twice"):
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
        read_checkpoint(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(20, 120))
def test_splits_as_huggingface_hub_does(sizes: list[int], limit: int) -> None:
    state = {f"t{i}": torch.empty(size, dtype=torch.bfloat16) for i, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=limit)
    ours = split_by_size([(name, tuple(t.shape), "bfloat16") for name, t in state.items()], limit)
    assert [[name for name, _, _ in shard] for shard in ours] == list(theirs.filename_to_tensors.values())
    assert shard_names(len(ours)) == list(theirs.filename_to_tensors)


def test_the_index_is_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    theirs = (tmp_path / "model.safetensors.index.json").read_bytes()
    index = json.loads(theirs)
    assert read_checkpoint(tmp_path).keys() == model.state_dict().keys()
    assert (
        index_json(index["weight_map"], *(index["metadata"][k] for k in ("total_size", "total_parameters"))) == theirs
    )


NAMES = st.sampled_from(["a", "b", "c"])
SIZES = st.sampled_from([0, 1, 2])


@st.composite
def headers(draw: st.DrawFn) -> str:
    """Entries of a header, most of them right, some with a name twice, a gap, another order, a wrong kind."""
    at, entries = 0, []
    for name in draw(st.lists(NAMES, min_size=1, max_size=3)):
        size = draw(SIZES)
        begin = at + draw(st.sampled_from([0, 0, 0, 0, 4, -4]))
        made = entry(begin, begin + 4 * size, [size], draw(st.sampled_from(["F32", "F32", "F32", "I32", "BF16", "X"])))
        if draw(st.integers(0, 7)) == 0:
            wrong = [
                ("shape", [True]),
                ("shape", [1.0]),
                ("shape", 2),
                ("more", 1),
                ("dtype", 7),
                ("data_offsets", [at]),
            ]
            made |= [draw(st.sampled_from(wrong))]
        text = json.dumps(made)
        if draw(st.integers(0, 15)) == 0:
            text = text.replace("{", '{"dtype": "F32", ', 1)
        entries.append(f'"{name}": {text}')
        at += 4 * size
    return ", ".join(draw(st.permutations(entries)) if draw(st.booleans()) else entries)


@settings(max_examples=300, deadline=None)
@given(text=headers(), payload=st.integers(0, 6), again=st.booleans())
def test_a_name_with_an_escape_in_the_metadata_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, text: str, payload: int, again: bool
) -> None:
    """A header is read the same, right or wrong, whether it may be read the quick way or, with an escape, may not."""
    path = tmp_path_factory.getbasetemp() / "either.safetensors"
    metadata = ', "__metadata__": {"format": "pt"}' if again else ""

    def told(spelled: str) -> object:
        raw(
            path,
            '{"__metadata__":{"format":"' + spelled + '"},' + text + metadata + "}" + " " * (8 - len(spelled)),
            4 * payload,
        )
        try:
            return list(read_header(path)[0].items()), read_header(path)[1]
        except CheckpointError as error:
            return str(error)

    assert told("pt") == told("\\u0070t")


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(st.tuples(NAMES, st.sampled_from(['"x"', '"y"', '"X"', "1"])), max_size=3),
    metadata=st.sampled_from(["", '"metadata": {"size": 1}, ', '"metadata": {"size": 1, "size": 2}, ', '"metadata": 1, ',
                              '"weight_map": {}, ', '"weight_map": {"metadata": "x"}, ', '"metadata": {}, "metadata": {}, ']),
)  # fmt: skip
def test_an_index_with_an_escape_is_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], metadata: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "either.json"
    entries = ", ".join(f'"{name}": {file}' for name, file in pairs)

    def told(key: str) -> object:
        path.write_text("{" + metadata + f'"{key}": {{{entries}}}' + "}")
        try:
            return list(read_index(path).items())
        except CheckpointError as error:
            return str(error)

    assert told("weight_map") == told("weight_ma\\u0070")
