"""FP8 and MXFP4 directories, as a reader sees them: the tensors that the scales belong to, and what is refused."""

from __future__ import annotations

import pytest

from shardtool.checkpoint.quantised import dequantised
from shardtool.errors import CheckpointError
from shardtool.formats.stored import BlockScaled, MicroScaled, Stored

CONFIG = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def tensor(shape: tuple[int, ...], dtype: str) -> Stored:
    return Stored("file", 0, shape, dtype)


def fp8(shape: tuple[int, int] = (576, 300), scale: tuple[int, ...] = (5, 3)) -> dict[str, Stored]:
    return {"w": tensor(shape, "float8_e4m3fn"), "w_scale_inv": tensor(scale, "float32"), "n": tensor((3,), "bfloat16")}


def mxfp4(**changes: Stored) -> dict[str, Stored]:
    return {"g_blocks": tensor((4, 96, 2, 16), "uint8"), "g_scales": tensor((4, 96, 2), "uint8")} | changes


def test_fp8_with_a_ragged_last_block():
    found = dequantised(fp8(), CONFIG, "here")
    assert found.keys() == {"w", "n"}
    assert (found["w"].dtype, found["w"].shape) == ("bfloat16", (576, 300))
    assert found["w"].quantised == BlockScaled(tensor((5, 3), "float32"), 128, 128)


def test_mxfp4_is_transposed():
    found = dequantised(mxfp4(), {"dtype": "float32"}, "here")
    assert found.keys() == {"g"}
    item = found["g"]
    assert (item.dtype, item.shape, item.strides) == ("float32", (4, 64, 96), (96 * 64, 1, 64))
    assert isinstance(item.quantised, MicroScaled)


def test_tensors_that_are_not_quantised_stay():
    held = {"n": tensor((3,), "bfloat16")}
    assert dequantised(held, {}, "here") == held


@pytest.mark.parametrize(
    ("stored", "config", "kind", "match"),
    [
        ({"w": tensor((4, 4), "float8_e4m3fn")}, CONFIG, CheckpointError, "no scales"),
        (fp8(scale=(3, 5)), CONFIG, CheckpointError, "do not fit it"),
        (fp8(), {"quantization_config": {"quant_method": "fp8"}}, CheckpointError, "which block"),
        (fp8(), {"quantization_config": {"weight_block_size": [0, 128]}}, CheckpointError, "which block"),
        (fp8() | {"w_scale_inv": tensor((5, 3), "uint8")}, CONFIG, CheckpointError, "not known"),
        (mxfp4(g_scales=tensor((4, 96, 3), "uint8")), {}, CheckpointError, "do not fit each other"),
        (mxfp4(g_blocks=tensor((4, 96, 2, 32), "uint8")), {}, CheckpointError, "do not fit each other"),
        (mxfp4(g=tensor((4, 64, 96), "bfloat16")), {}, CheckpointError, "both quantised and not"),
    ],
)
def test_what_does_not_fit_is_an_error(stored, config, kind, match):
    with pytest.raises(kind, match=match):
        dequantised(stored, config, "here")


def test_scales_without_their_tensor_are_left_for_the_accounting():
    assert dequantised({"w_scale_inv": tensor((5, 3), "float32")}, CONFIG, "here").keys() == {"w_scale_inv"}
