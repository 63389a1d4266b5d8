"""Values that change on their way: dequantised, scaled, shifted, normalised. In fp32, a tile at a time.

A conversion with such tensors computes in fp32 (numpy) and rounds once, when the element is put into the target.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from math import prod
from threading import Lock
from typing import Any, NamedTuple

from shardtool.errors import CheckpointError
from shardtool.execute.numbers import numpy, numpy_dtype
from shardtool.formats.stored import ITEMSIZE, BlockScaled, MicroScaled, Product, Stored
from shardtool.layout.codecs import Affine, Centred, Codec, NormalisedRows

ReadBytes = Callable[[str, int, int], memoryview]  # file, offset, size; valid until the next call

BLOCK_ELEMENTS = 1 << 18  # of a matrix that is read as a whole for a few numbers
KEPT_MEANS = 16
MICRO_BLOCK = 32  # elements that share a scale in MXFP4
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Change(NamedTuple):
    """What happens between a source's stored elements and the target's: decoded as the one piece, encoded as the other."""

    decode: Codec | None
    encode: Codec | None


class Values(NamedTuple):
    """A source whose elements are computed: its stored tensor, and the change of its values (None: as they are).

    `scale_dtype` is the dtype to which scales are rounded that say so; empty: that of the stored tensor.
    """

    stored: Stored
    change: Change | None
    scale_dtype: str = ""


def change(source: Codec | None, target: Codec | None) -> Change | None:
    """The change between two pieces; None where the elements are the same."""
    return None if source == target else Change(source, target)


def read_values(values: Values, low: int, count: int, read: ReadBytes) -> Any:
    """`count` elements from number `low` on, in the order of storage, as an fp32 array (fp64 for an fp64 source)."""
    stored, total = values.stored, prod(values.stored.shape)
    unit = _unit(values)
    start, stop = low - low % unit, min(total, low + count + -(low + count) % unit)
    found = _stored_values(stored, start, stop - start, read)
    if values.change is not None:
        width = stored.shape[-1] if stored.shape else 1
        if isinstance(values.change.decode, Centred) and values.change.decode.columns:
            found = (found.reshape(-1, width) - _column_means(stored, read)).reshape(-1)
        found = apply(values.change, found, width, stored.dtype, values.scale_dtype)
    return found[low - start : low - start + count]


def _unit(values: Values) -> int:
    """The number of elements that are computed together: a row, a block of MXFP4, or one."""
    stored = values.stored
    if isinstance(stored.quantised, MicroScaled):
        return MICRO_BLOCK
    needs_rows = values.change is not None and isinstance(values.change.decode, NormalisedRows | Centred)
    if needs_rows and stored.strides is not None:
        raise CheckpointError(
            "a tensor whose rows are needed whole is not stored row by row",
            where=stored.file,
            hint="save it with .contiguous()",
        )
    return stored.shape[-1] if needs_rows or isinstance(stored.quantised, BlockScaled) else 1


def apply(change: Change, values: Any, width: int, dtype: str, scale_dtype: str = "") -> Any:
    """The values of whole rows (of `width` elements) with a change applied; `dtype` is that of the source tensor.

    `scale_dtype` is that of scales which are rounded; empty: the source's.
    """
    scale_dtype = scale_dtype or dtype
    if isinstance(change.decode, Affine):
        values = _affine(change.decode, values, scale_dtype, forward=not change.decode.inverse)
    elif isinstance(change.decode, NormalisedRows):
        values = _normalise(values, width, dtype)
    elif (
        change.decode is not None and not change.decode.columns
    ):  # columns: `read_values`, with the whole tensor's means
        rows = values.reshape(-1, width)
        values = (rows - rows.mean(axis=1, keepdims=True, dtype=numpy().float64)).reshape(-1)
    if isinstance(change.encode, Affine):
        values = _affine(change.encode, values, scale_dtype, forward=change.encode.inverse)
    return values


def _normalise(values: Any, width: int, dtype: str) -> Any:
    np = numpy()
    rows = values.reshape(-1, width)
    # the sum in fp64: a row that is normalised already has the norm 1 after rounding, and stays as it is
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    stored = numpy_dtype(dtype, values=True)
    norms = np.maximum(norms, 1e-12).astype(stored).astype(np.float32)
    return (rows / norms[:, None]).astype(stored).astype(np.float32).reshape(-1)


def _affine(codec: Affine, values: Any, dtype: str, *, forward: bool) -> Any:
    """values * scale + shift, or that undone."""
    kind = values.dtype.type
    scale = kind(numpy_dtype(dtype, values=True).type(codec.scale)) if codec.rounded else kind(codec.scale)
    shift = kind(codec.shift)
    if not forward:
        values = values - shift if shift else values
        return values / scale if scale != 1 else values
    values = values * scale if scale != 1 else values
    return values + shift if shift else values


def _stored_values(stored: Stored, low: int, count: int, read: ReadBytes) -> Any:
    np = numpy()
    if isinstance(stored.quantised, BlockScaled):
        return _block_scaled(stored, stored.quantised, low, count, read)
    if isinstance(stored.quantised, MicroScaled):
        return _micro_scaled(stored, stored.quantised, low, count, read)
    if isinstance(stored.quantised, Product):
        return _product(stored.quantised, low, count, read)
    width = ITEMSIZE[stored.dtype]
    raw = np.frombuffer(
        read(stored.file, stored.offset + low * width, count * width), numpy_dtype(stored.dtype, values=True)
    )
    return raw.astype(np.float64 if stored.dtype == "float64" else np.float32)


def _block_scaled(stored: Stored, form: BlockScaled, low: int, count: int, read: ReadBytes) -> Any:
    """FP8 rows times the scales of their blocks, in fp32."""
    np = numpy()
    width = stored.shape[-1]
    first, rows = low // width, count // width
    across = -(-width // form.columns)
    bands = range(first // form.rows, (first + rows - 1) // form.rows + 1)
    size = ITEMSIZE[form.scale.dtype]
    raw = read(form.scale.file, form.scale.offset + bands.start * across * size, len(bands) * across * size)
    scales = np.frombuffer(raw, numpy_dtype(form.scale.dtype, values=True)).astype(np.float32).reshape(-1, across)
    data = np.frombuffer(read(stored.file, stored.offset + low, count), np.uint8)
    values = np.take(_e4m3(), data, mode="clip").reshape(rows, width)  # twice as fast as indexing
    for band in bands:
        begin, end = max(first, band * form.rows) - first, min(first + rows, (band + 1) * form.rows) - first
        values[begin:end] *= np.repeat(scales[band - bands.start], form.columns)[:width]
    return values.reshape(-1)


def block_values(scales: Any) -> Any:
    """The values of all bytes in blocks of these scales [blocks], as `read_values` has them: [blocks, 256]."""
    np = numpy()
    values = _e4m3()[None].repeat(len(scales), axis=0)
    values *= scales.astype(np.float32).repeat(256).reshape(-1, 256)
    return values


def _micro_scaled(stored: Stored, form: MicroScaled, low: int, count: int, read: ReadBytes) -> Any:
    """MXFP4 elements times the power of two of their block, in fp32 (exact)."""
    np = numpy()
    blocks = count // MICRO_BLOCK
    raw = np.frombuffer(read(form.scale.file, form.scale.offset + low // MICRO_BLOCK, blocks), np.uint8)
    index = raw.astype(np.intp)[:, None] << 8  # before the next bytes are read over these
    data = np.frombuffer(read(stored.file, stored.offset + low // 2, count // 2), np.uint8)
    index = index + data.reshape(blocks, MICRO_BLOCK // 2)
    return _scaled_pairs().take(index.reshape(-1), mode="clip").view(np.float32)  # ldexp takes 20 times as long


def _product(form: Product, low: int, count: int, read: ReadBytes) -> Any:
    """Rows of a matrix times a vector, summed in fp64."""
    np = numpy()
    width = form.matrix.shape[-1]
    vector = _stored_values(form.vector, 0, width, read).astype(np.float64)
    found = np.zeros(count)
    if form.bias is not None:
        found += _stored_values(form.bias, low, count, read)
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, count, step):
        rows = _stored_values(form.matrix, (low + start) * width, min(step, count - start) * width, read)
        found[start : start + step] += rows.reshape(-1, width) @ vector
    return found


_MEANS: OrderedDict[Stored, Any] = OrderedDict()  # of the tensors that are being written
_MEANS_LOCK = Lock()


def _column_means(stored: Stored, read: ReadBytes) -> Any:
    """The mean of every column of a matrix, in fp64: the tensor is read once more, in blocks of rows."""
    with _MEANS_LOCK:
        found = _MEANS.get(stored)
    if found is None:
        width, total = stored.shape[-1], prod(stored.shape)
        step = max(1, BLOCK_ELEMENTS // width) * width
        found = numpy().zeros(width)
        for low in range(0, total, step):
            found += (
                _stored_values(stored, low, min(step, total - low), read).reshape(-1, width).sum(axis=0, dtype=float)
            )
        found /= total // width
        with _MEANS_LOCK:
            _MEANS[stored] = found
            while len(_MEANS) > KEPT_MEANS:
                _MEANS.popitem(last=False)
    return found


@cache
def _e4m3() -> Any:
    """The values of all bytes."""
    np = numpy()
    return np.arange(256, dtype=np.uint8).view(numpy_dtype("float8_e4m3fn", values=True)).astype(np.float32)


@cache
def _scaled_pairs() -> Any:
    """The two values of all bytes, two fp32 in a word of 8 bytes, for all scales: at byte + 256 * scale."""
    np = numpy()
    four = np.array([*E2M1, *(-value for value in E2M1)], np.float32)
    numbers = np.arange(256)
    pairs = np.stack([four[numbers & 15], four[numbers >> 4]], axis=1)
    with np.errstate(over="ignore"):
        scaled = np.ldexp(pairs, (numbers - 127).astype(np.int32)[:, None, None])
    return scaled.astype(np.float32).reshape(-1).view(np.float64)
