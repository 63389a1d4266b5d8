"""Values that change on their way, against plain statements in torch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool.execute import engine, tiles
from shardtool.execute.codecs import Change, Values, apply, change, read_values
from shardtool.execute.files import Files
from shardtool.execute.tiles import Workspace
from shardtool.formats.stored import BlockScaled, MicroScaled, Payload, Skeleton, Stored
from shardtool.layout.codecs import CENTRED, Affine, NormalisedRows, describe
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import Layout, centred
from shardtool.layout.megatron import Spelling, dist_layout, legacy_layout
from shardtool.layout.mesh import Mesh, chunks
from shardtool.layout.rules import rule
from shardtool.plan.explain import explain
from shardtool.plan.plan import plan, replicas

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = st.sampled_from(sorted(TORCH))


def save(path: Path, tensor: torch.Tensor, name: str | None = None) -> Stored:
    """A tensor's bytes in a file."""
    path.write_bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Stored(str(path), 0, tuple(tensor.shape), name or str(tensor.dtype).removeprefix("torch."))


def random(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(TORCH[dtype])


def read(values: Values, low: int, count: int) -> torch.Tensor:
    space = Workspace()
    try:
        return torch.from_numpy(np.array(read_values(values, low, count, space.read)))
    finally:
        space.close()


# --- dequantisation --------------------------------------------------------------------------------------------------


def fp8(rows: int, columns: int, block: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(FP8 matrix, scales, values in fp32): every element times the scale of its block, element by element."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    raw[(raw & 0x7F) == 0x7F] = 0  # not a number
    matrix = raw.view(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) + 0.01
    each = scales[torch.arange(rows)[:, None] // block[0], torch.arange(columns)[None] // block[1]]
    return matrix, scales, matrix.float() * each


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fp8_blocks_at_any_edge(data, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("fp8")
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    matrix, scales, values = fp8(rows, columns, block, data.draw(st.integers(0, 99)))
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    values = values if kind == torch.float32 else None
    scale = save(tmp / "scale", scales.to(kind))
    stored = Stored(str(save(tmp / "w", matrix).file), 0, (rows, columns), "bfloat16", None, BlockScaled(scale, *block))
    low = data.draw(st.integers(0, rows * columns - 1))
    count = data.draw(st.integers(1, rows * columns - low))
    if values is None:
        at = torch.arange(rows)[:, None] // block[0], torch.arange(columns)[None] // block[1]
        values = matrix.float() * scales.bfloat16().float()[at]
    assert torch.equal(read(Values(stored, None), low, count), values.reshape(-1)[low : low + count])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mxfp4_elements(data, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("mxfp4")
    rows, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    blocks = torch.randint(0, 256, (rows, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (rows, groups), generator=generator, dtype=torch.uint8)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    wanted = []
    for row in range(rows):
        for group in range(groups):
            for byte in blocks[row, group].tolist():
                factor = math.ldexp(1, scales[row, group].item() - 127)
                wanted += [table[byte & 15] * factor, table[byte >> 4] * factor]
    form = MicroScaled(save(tmp / "scales", scales))
    stored = Stored(save(tmp / "blocks", blocks).file, 0, (rows, groups * 32), "bfloat16", None, form)
    low = data.draw(st.integers(0, len(wanted) - 1))
    count = data.draw(st.integers(1, len(wanted) - low))
    assert torch.equal(read(Values(stored, None), low, count), torch.tensor(wanted)[low : low + count])


def test_mxfp4_all_bytes_at_all_scales(tmp_path):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    blocks = torch.arange(256, dtype=torch.uint8).repeat(256)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)
    pairs = torch.stack([table[blocks.int() & 15], table[blocks.int() >> 4]], 1).reshape(-1)
    wanted = (pairs * torch.exp2(scales.double() - 127).repeat_interleave(32)).float()
    form = MicroScaled(save(tmp_path / "scales", scales))
    stored = Stored(save(tmp_path / "blocks", blocks).file, 0, (len(wanted),), "bfloat16", None, form)
    found = read(Values(stored, None), 0, len(wanted))
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


# --- codecs ----------------------------------------------------------------------------------------------------------


@given(FLOATS, st.integers(0, 99), st.booleans())
def test_a_scale_is_multiplied_in_fp32(dtype, seed, rounded):
    x = random((24,), dtype, seed)
    scale = math.sqrt(3072)
    factor = torch.tensor(scale, dtype=TORCH[dtype]).float() if rounded else torch.tensor(scale)
    found = apply(Change(Affine(scale, rounded=rounded), None), x.float().numpy(), 24, dtype)
    assert torch.equal(torch.from_numpy(found), x.float() * factor)
    back = apply(Change(None, Affine(scale, rounded=rounded)), x.float().numpy(), 24, dtype)
    assert torch.equal(torch.from_numpy(back), x.float() / factor)
    product = apply(Change(None, Affine(scale, inverse=True, rounded=rounded)), x.float().numpy(), 24, dtype)
    assert torch.equal(torch.from_numpy(product), x.float() * factor)


@given(FLOATS, st.integers(0, 99))
def test_normalised_rows_are_those_of_torch_and_stay(dtype, seed):
    x = random((5, 48), dtype, seed, 3.0)
    first = apply(Change(NormalisedRows(), None), x.float().numpy().reshape(-1), 48, dtype)
    wanted = torch.nn.functional.normalize(x)
    found = torch.from_numpy(first).reshape(5, 48).to(TORCH[dtype])
    # torch sums in another order: the norm may be rounded the other way
    assert torch.allclose(found.float(), wanted.float(), rtol=2 * torch.finfo(TORCH[dtype]).eps, atol=0)
    again = apply(Change(NormalisedRows(), None), first, 48, dtype)
    norms = found.double().norm(dim=1).to(TORCH[dtype])
    assert torch.equal(torch.from_numpy(again).reshape(5, 48)[norms == 1], found.float()[norms == 1])


def test_the_same_codec_on_both_sides_changes_nothing():
    assert change(CENTRED, Affine(shift=1.0)) is None
    assert change(None, None) is None
    assert change(CENTRED, None) == Change(CENTRED, None)


def test_words():
    assert describe(None) == "stored as it is"
    assert describe(CENTRED) == "value = stored * 1.0 + 1.0"
    assert describe(Affine(2.0, inverse=True, rounded=True)) == (
        "stored = value * 2.0 + 0.0, the factor rounded to the dtype"
    )
    assert describe(NormalisedRows()) == "rows normalised"


# --- through the engine ----------------------------------------------------------------------------------------------

SIZES = {"l": 2, "v": 10, "h": 12, "f": 8, "e": 2, "x": 4}
RULES = (
    rule("embed", "v h -> v h", "output_layer.weight", "v",
         derived=(("embedding.word_embeddings.weight", Affine(3.5, inverse=True)),)),
    rule("norm.{l}", "h -> h", "decoder.layers.{l}.pre_mlp_layernorm.weight", codecs=(CENTRED,)),
    rule(("gate.{l}", "up.{l}"), "f h, f h -> (f + f) h", "decoder.layers.{l}.mlp.linear_fc1.weight", "f",
         codecs=(None, Affine(0.3))),
    rule("down.{l}", "h f -> h f", "decoder.layers.{l}.mlp.linear_fc2.weight", "f", codecs=(NormalisedRows(),)),
)  # fmt: skip


def execute(made, source, tmp: Path, dtype: str) -> dict:
    """The target's tensors by key."""
    width, files = TORCH[dtype].itemsize, {}
    payloads = {}
    at = 0
    for key, piece in made.dst.tensors():
        payloads[key] = Payload(at, made.dst.shape(piece), dtype)
        at += payloads[key].nbytes
    files = Files(tmp, {"out": Skeleton(at, ((0, b""),), {})}, durable=False)
    work = [(task, "out", payloads[task.key]) for task in engine.tasks(made, lambda _: dtype)]
    engine.write(work, files, source.__getitem__)
    files.close(sync=True)
    data = (tmp / "out").read_bytes()
    return {
        key: torch.frombuffer(bytearray(data[p.offset : p.offset + p.nbytes]), dtype=TORCH[dtype]).reshape(p.shape)
        for key, p in payloads.items()
        if p.nbytes >= width
    }


@pytest.mark.parametrize("tile", [64, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
def test_what_is_written(fmt, dtype, tile, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
    source = huggingface_layout(RULES, SIZES)
    arrays = {key: random(source.shape(piece), dtype, number) for number, (key, piece) in enumerate(source.tensors())}
    stored = {key: save(tmp_path / f"{key[1]}", value) for key, value in arrays.items()}
    hf = {key[1]: value for key, value in arrays.items()}
    mesh = Mesh(tp=2)
    places = {(tp, 0, 0): f"rank{tp}" for tp in range(2)}
    target: Layout = (
        legacy_layout(RULES, SIZES, 12, chunks(mesh, 2), mesh, Spelling(), places)
        if fmt == "torch"
        else dist_layout(RULES, SIZES, 12, chunks(mesh, 2), mesh)
    )
    made = plan(source, centred(target))
    found = execute(made, stored, tmp_path, dtype)

    def whole(name: str, dim: int = 0, layer: int = 0) -> torch.Tensor:
        if fmt == "torch":
            ranks = [found[f"rank{tp}", name.format(l=layer), (0,)] for tp in range(2)]
            if ".linear_fc1." in name:
                return torch.cat(
                    [half for part in zip(*(rank.chunk(2) for rank in ranks), strict=True) for half in part]
                )
            return torch.cat(ranks, dim) if dim >= 0 else ranks[1]
        name = name.replace("decoder.layers.{l}.", "decoder.layers.")
        parts = sorted((key[2], value) for key, value in found.items() if key[1] == name)
        parts = [(at, value) for at, value in parts if not name.startswith("decoder") or at[0] == layer]
        return torch.cat([value for _, value in parts], max(dim, 0)) if len(parts) > 1 else parts[0][1]

    kind = TORCH[dtype]
    assert torch.equal(whole("output_layer.weight")[:10], hf["embed"])
    assert torch.equal(whole("embedding.word_embeddings.weight")[:10], (hf["embed"].float() * 3.5).to(kind))
    for layer in range(2):
        assert torch.equal(whole("decoder.layers.{l}.pre_mlp_layernorm.weight", -1, layer), hf[f"norm.{layer}"])
        fc1 = torch.cat([hf[f"gate.{layer}"].float(), hf[f"up.{layer}"].float() * 0.3]).to(kind)
        assert torch.equal(whole("decoder.layers.{l}.mlp.linear_fc1.weight", 0, layer), fc1)
        down = torch.nn.functional.normalize(hf[f"down.{layer}"])
        ours = whole("decoder.layers.{l}.mlp.linear_fc2.weight", 1, layer)
        assert torch.allclose(ours.float(), down.float(), rtol=2 * torch.finfo(kind).eps, atol=0)
    assert any("rows normalised" in line for line in explain(made))
    assert made.as_dict()["rules"][3]["copies"][0]["from_codec"] == "rows normalised"


def test_norms_that_are_not_centred_in_the_target_take_one(tmp_path):
    source = huggingface_layout(RULES[1:2], SIZES)
    stored = {key: save(tmp_path / key[1], random((12,), "bfloat16", 3)) for key, _ in source.tensors()}
    target = dist_layout(RULES[1:2], SIZES, 12, chunks(Mesh(), 2), Mesh())
    found = execute(plan(source, target), stored, tmp_path, "bfloat16")
    one = (random((12,), "bfloat16", 3).float() + 1).to(torch.bfloat16)
    assert all(torch.equal(value, one) for value in found.values())


def test_a_derived_tensor_is_compared_with_what_it_comes_from(tmp_path):
    layout = dist_layout(RULES[:1], SIZES, 10, chunks(Mesh(), 2), Mesh())
    head = random((10, 12), "bfloat16", 1)
    held = {
        "output_layer.weight": save(tmp_path / "head", head),
        "embedding.word_embeddings.weight": save(tmp_path / "embed", (head.float() * 3.5).bfloat16()),
    }
    twins = replicas(layout)
    assert twins is not None
    assert engine.compare(twins, lambda key: held[key[1]], lambda key: held[key[1]]) == (120, [])
    held["embedding.word_embeddings.weight"] = save(tmp_path / "other", head)
    assert engine.compare(twins, lambda key: held[key[1]], lambda key: held[key[1]])[1][0].elements > 100
