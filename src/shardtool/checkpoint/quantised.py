"""Quantised tensors of Hugging Face directories, presented under the names and shapes of the tensors that they stand for.

FP8 (DeepSeek-V3, Kimi-K2): `NAME` in e4m3fn beside `NAME_scale_inv`, one scale per block of `weight_block_size`.
MXFP4 (gpt-oss): `NAME_blocks` [e, rows, groups of 32, 16 bytes] and `NAME_scales` [e, rows, groups of 32] for
`NAME` [e, 32 x groups, rows], whose last two dims are exchanged (transformers 5.23 integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from shardtool.errors import GET_AGAIN, CheckpointError
from shardtool.execute.codecs import MICRO_BLOCK
from shardtool.formats.inert import brief
from shardtool.formats.stored import BlockScaled, MicroScaled, Stored

FP8 = "float8_e4m3fn"
SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"


def dequantised(stored: Mapping[str, Stored], config: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """The tensors by name, the quantised ones with their scales taken in.

    Their dtype is the model's (`torch_dtype` of config.json, else bfloat16): values are rounded to it once, unless
    another is asked for. CheckpointError names a quantised tensor without scales, scales without a tensor, and shapes
    that do not fit, or that config.json does not say how an FP8 tensor is scaled.
    """
    quantisation = config.get("quantization_config") or {}
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    found, taken = dict(stored), set[str]()
    for name, item in stored.items():
        if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in stored:
            whole = name.removesuffix(BLOCKS)
            if whole in stored:
                raise CheckpointError(
                    "a tensor is there both quantised and not",
                    where=f"{where}: {whole}",
                    hint="remove the one that is not the model's",
                )
            found[whole] = _micro_scaled(whole, item, stored[whole + SCALES], dtype, where)
            taken |= {name, whole + SCALES}
        elif item.dtype == FP8:
            found[name] = _block_scaled(name, item, stored.get(name + SCALE), quantisation, dtype, where)
            taken.add(name + SCALE)
    return {name: item for name, item in found.items() if name not in taken}


def _block_scaled(
    name: str, item: Stored, scale: Stored | None, quantisation: Mapping[str, Any], dtype: str, where: str
) -> Stored:
    place = f"{where}: {name}"
    if scale is None:
        raise CheckpointError(
            "an FP8 tensor has no scales",
            where=place,
            expected=name + SCALE,
            found="none",
            hint="copy the files again: the scales are tensors of their own",
        )
    block = quantisation.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise CheckpointError(
            "config.json does not say which block of an FP8 tensor a scale is for", where=place,
            expected="quantization_config.weight_block_size, two sizes", found=brief(block) if block else "none",
            hint="take config.json again from where the model comes from",
        )  # fmt: skip
    if len(item.shape) != 2 or scale.dtype not in ("float32", "bfloat16"):
        raise CheckpointError(
            "an FP8 tensor is stored in a way that is not known", where=place,
            expected="a matrix, its scales in float32 or bfloat16", found=f"{list(item.shape)}, scales {scale.dtype}",
            hint="dequantise it with transformers and save it in bfloat16",
        )  # fmt: skip
    rows, columns = block
    expected = (-(-item.shape[0] // rows), -(-item.shape[1] // columns))
    if scale.shape != expected:
        raise CheckpointError(
            "the scales of an FP8 tensor do not fit it", where=place + SCALE, expected=str(list(expected)),
            found=str(list(scale.shape)),
            hint="config.json and the tensors are not of one model: get them again from one place",
        )  # fmt: skip
    return replace(item, dtype=dtype, quantised=BlockScaled(scale, rows, columns))


def _micro_scaled(name: str, blocks: Stored, scales: Stored, dtype: str, where: str) -> Stored:
    fits = (
        len(blocks.shape) == 4
        and blocks.shape[3] == MICRO_BLOCK // 2
        and scales.shape == blocks.shape[:3]
        and blocks.dtype == scales.dtype == "uint8"
    )
    if not fits:
        raise CheckpointError(
            "the blocks and scales of an MXFP4 tensor do not fit each other", where=f"{where}: {name}",
            expected="blocks [experts, rows, groups, 16] and scales [experts, rows, groups], uint8",
            found=f"{list(blocks.shape)} {blocks.dtype} and {list(scales.shape)} {scales.dtype}",
            hint=GET_AGAIN,
        )  # fmt: skip
    count, rows, groups = scales.shape
    inner = groups * MICRO_BLOCK
    shape, strides = (count, inner, rows), (rows * inner, 1, inner)
    return Stored(blocks.file, blocks.offset, shape, dtype, strides, MicroScaled(scales))
