"""FP8 matrices with a scale per block, element by element out of tables of the target's words.

A block has 256 different results at most. They are computed like all values (in fp32, rounded once) and then looked
up: the index of an element is its byte, and above it the number of its block in the row. The numbers stay the same from
row to row, so that only the lowest byte of each index is written before each look-up. That is one store and one load
for an element, where computing takes ten passes over memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from shardtool.execute.buffers import SPAN_FACTOR
from shardtool.execute.codecs import block_values
from shardtool.execute.numbers import numpy, numpy_dtype
from shardtool.formats.stored import ITEMSIZE, BlockScaled, Stored

if TYPE_CHECKING:
    from shardtool.execute.tiles import Move, Workspace

ROUNDED = ("bfloat16", "float16", "float32")  # dtypes that are looked up
LEAST = 1 << 10  # elements of a block and of a box from which on tables pay
CHUNK = 1 << 16  # elements that are looked up at once: their indices (8 bytes each) stay in the cache
READ_BYTES = 2 << 20  # of whole rows that are read at once


class Box(Struct, frozen=True):
    """Rows of a block of columns of a matrix, and where they go: the first element, and the step from row to row."""

    row: int
    column: int
    rows: int
    columns: int
    target: int
    step: int


def look_up(work: Workspace, part: Move, tile: memoryview, low: int, dtype: str) -> bool:
    """Put a part of an FP8 matrix into a tile that begins with element `low`; False where that is left to others."""
    if part.values is None or part.values.change is not None or dtype not in ROUNDED:
        return False
    stored = part.values.stored
    form = stored.quantised
    if not isinstance(form, BlockScaled) or stored.strides is not None or form.rows * form.columns < LEAST:
        return False
    found = boxes(part, stored.shape[-1])
    if found is None:
        return False
    words = numpy().frombuffer(tile, f"u{ITEMSIZE[dtype]}")
    for box in found:
        _fill(work, stored, form, box, words[box.target - low :], dtype)
    return True


def shared_rows(found: Sequence[Sequence[Move]], dtype: str) -> Stored | None:
    """The FP8 matrix of which each of these targets is a block of columns, of the same rows; None where it is not so."""
    first = found[0][0]
    if first.values is None or dtype not in ROUNDED or len(first.shape) != 2:
        return None
    stored = first.values.stored
    for moves in found:
        move = moves[0]
        if (
            len(moves) != 1
            or move.values != first.values
            or move.values.change is not None
            or not isinstance(stored.quantised, BlockScaled)
            or stored.strides is not None
            or move.shape[0] != first.shape[0]
            or move.src_strides != (stored.shape[-1], 1)
            or move.src_offset // stored.shape[-1] != first.src_offset // stored.shape[-1]
        ):
            return None
    return stored


def rows_at_once(stored: Stored, row_bytes: int, tile_bytes: int) -> int:
    """How many rows of an FP8 matrix are read together for targets with rows of `row_bytes`: whole blocks if possible."""
    rows = max(1, min(READ_BYTES // stored.shape[-1], tile_bytes // row_bytes))
    block = stored.quantised.rows if isinstance(stored.quantised, BlockScaled) else 1
    return rows - rows % block or rows


def boxes(part: Move, width: int) -> list[Box] | None:
    """A part of a row-major matrix of rows of `width` elements as boxes; None where they would be too small."""
    dims = [dim for dim in zip(part.shape, part.src_strides, part.dst_strides, strict=True) if dim[0] > 1]
    size, source, target = dims.pop() if dims else (1, 1, 1)
    if source != 1 or target != 1:
        return None
    rows, step = 1, size
    if dims and dims[-1][1] == width and part.src_offset % width + size <= width:
        rows, _, step = dims.pop()
    if dims and size * rows < LEAST:
        return None
    found: list[Box] = []
    for index in product(*(range(count) for count, _, _ in dims)):
        at = part.src_offset + sum(i * dim[1] for i, dim in zip(index, dims, strict=True))
        to = part.dst_offset + sum(i * dim[2] for i, dim in zip(index, dims, strict=True))
        if rows == 1:
            found += _run(at, size, width, to)
        elif at % width + size <= width:
            found.append(Box(at // width, at % width, rows, size, to, step))
        else:
            return None
    return found


def _run(at: int, size: int, width: int, target: int) -> Iterator[Box]:
    """Elements that follow each other: the rest of a row, whole rows, the beginning of a row."""
    end = at + size
    while at < end:
        row, column = divmod(at, width)
        rows = (end - at) // width if not column else 0
        columns = width if rows else min(width - column, end - at)
        yield Box(row, column, max(rows, 1), columns, target, columns)
        at, target = at + max(rows, 1) * columns, target + max(rows, 1) * columns


def _fill(work: Workspace, stored: Stored, form: BlockScaled, box: Box, words: Any, dtype: str) -> None:
    """Look up a box; `words` begin with its first element."""
    np = numpy()
    index = _index(work, form, box)
    lowest = index.view(np.uint8).reshape(*index.shape, -1)[:, :, 0 if np.little_endian else -1]
    dense = box.step == box.columns or box.rows == 1
    if dense:
        target = words[: box.rows * box.columns].reshape(box.rows, box.columns)
    else:
        target = np.lib.stride_tricks.as_strided(
            words, (box.rows, box.columns), (box.step * words.itemsize, words.itemsize)
        )
    for first, data in _rows(work, stored, box):
        at = 0
        while at < len(data):
            row = box.row + first + at
            count = min(len(index), len(data) - at, form.rows - row % form.rows)
            table = _table(work, form, row // form.rows, box, dtype, stored.shape[-1])
            lowest[:count] = data[at : at + count]
            out = target[first + at : first + at + count]
            if dense:
                table.take(index[:count], mode="clip", out=out)
            else:  # numpy would copy what `out` holds before, too
                held = np.frombuffer(work.buffer("words", out.size * out.itemsize), out.dtype).reshape(out.shape)
                out[...] = table.take(index[:count], mode="clip", out=held)
            at += count


def _rows(work: Workspace, stored: Stored, box: Box) -> Iterator[tuple[int, Any]]:
    """The bytes of a box, some rows at a time: (number of the first, [rows, columns])."""
    np, width = numpy(), stored.shape[-1]
    count = max(1, READ_BYTES // width)
    for first in range(0, box.rows, count):
        rows = min(count, box.rows - first)
        at = stored.offset + (box.row + first) * width
        if width <= SPAN_FACTOR * box.columns or work.holds(stored.file, at, rows * width):
            raw = np.frombuffer(work.read_once(stored.file, at, rows * width), np.uint8).reshape(rows, width)
            yield first, raw[:, box.column : box.column + box.columns]
            continue
        held = work.buffer("span", rows * box.columns)
        for row in range(rows):
            work.read_into(
                stored.file, at + row * width + box.column, held[row * box.columns : (row + 1) * box.columns]
            )
        yield first, np.frombuffer(held, np.uint8).reshape(rows, box.columns)


def _index(work: Workspace, form: BlockScaled, box: Box) -> Any:
    """Indices of [rows, columns]: the number of the block in a row, times 256."""
    np = numpy()
    lead, rows = box.column % form.columns, min(box.rows, form.rows, max(1, CHUNK // box.columns))
    key = (lead, box.columns, form.columns)
    held = work.kept.get("index")
    if held is None or held[0] != key or len(held[1]) < rows:
        index = np.frombuffer(work.buffer("index", 8 * rows * box.columns), np.intp).reshape(rows, box.columns)
        index[...] = (lead + np.arange(box.columns)) // form.columns << 8
        held = work.kept["index"] = key, index
    return held[1]


def _table(work: Workspace, form: BlockScaled, band: int, box: Box, dtype: str, width: int) -> Any:
    """The words of all bytes, for each block that a box has of a band of blocks."""
    first, last = box.column // form.columns, (box.column + box.columns - 1) // form.columns
    key = (form, band, first, last, dtype)
    held = work.kept.get("table")
    if held is None or held[0] != key:
        np = numpy()
        size, across = ITEMSIZE[form.scale.dtype], -(-width // form.columns)
        raw = work.buffer("scales", (last - first + 1) * size)
        work.read_into(form.scale.file, form.scale.offset + (band * across + first) * size, raw)
        with np.errstate(all="ignore"):  # as where elements are computed one by one
            words = block_values(np.frombuffer(raw, numpy_dtype(form.scale.dtype, values=True))).astype(
                numpy_dtype(dtype, values=True)
            )
        held = work.kept["table"] = key, words.view(f"u{words.itemsize}").reshape(-1)
    return held[1]
