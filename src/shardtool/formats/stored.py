"""What a format knows of a tensor on disk, and what a file is before its payload is written.

Formats know bytes, not models: a `Stored` tensor is a place in a file, a `Skeleton` is every byte of a file
that is not tensor payload. The execution engine moves payload between the two.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from math import prod

from msgspec import Struct, field

from shardtool.errors import CheckpointError

# dtype names are torch's, without the prefix
ITEMSIZE: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip


def unsupported_dtype(where: str, found: str, known: Iterable[str] = ITEMSIZE) -> CheckpointError:
    """A tensor of a dtype that no reader here knows."""
    return CheckpointError(
        "a tensor has a dtype that is not supported", where=where, expected=", ".join(known), found=found,
        hint="load it with the tool that wrote it and save it in one of the dtypes above",
    )  # fmt: skip


class BlockScaled(Struct, frozen=True):
    """FP8 (e4m3fn) bytes with one scale per block of `rows` x `columns` of the matrix: value = byte * scale.

    `scale` is [ceil(matrix rows / rows), ceil(matrix columns / columns)] in fp32 or bf16; edge blocks may be smaller.
    """

    scale: Stored
    rows: int = 128
    columns: int = 128


class MicroScaled(Struct, frozen=True):
    """MXFP4: two e2m1 elements per byte, the low half first; value = element * 2 ** (scale - 127).

    `scale` has one byte for every 32 elements in the order of storage.
    """

    scale: Stored


class Product(Struct, frozen=True):
    """A vector that is stored nowhere: matrix @ vector + bias (a norm's bias on its way through the next linear)."""

    matrix: Stored
    vector: Stored
    bias: Stored | None = None


class Stored(Struct, frozen=True, gc=False):
    """One tensor's payload: `shape` elements of `dtype` from byte `offset` of `file` (a path that can be opened).

    `strides` are in elements; None means row-major and contiguous. A `quantised` tensor's payload is in another form;
    `dtype` is what its values are rounded to when nothing else is asked for. So is a tensor that is computed.
    """

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    quantised: BlockScaled | MicroScaled | Product | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements (of the span they cover, when the strides are not row-major, at most more)."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


BLOCK = 4096  # bytes of a file system's block, as far as layouts care


class Payload(Struct, frozen=True, gc=False):
    """Where the bytes of one tensor of a file being written go.

    `crc_at` are the positions that take the little-endian CRC32 of the payload once it is known (zip formats).
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    crc_at: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


class Skeleton(Struct, frozen=True):
    """A file before its payload: `size` bytes in all, `parts` (offset, bytes) written first, `payload` by key."""

    size: int
    parts: tuple[tuple[int, bytes], ...]
    payload: Mapping[Hashable, Payload] = field(default_factory=dict)


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor, as torch.empty(shape) has them (an axis of size 0 counts as 1)."""
    steps: list[int] = []
    step = 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))


def row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements follow each other in row-major order; the stride of an axis of size 1 says nothing."""
    if 0 in shape:
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True
