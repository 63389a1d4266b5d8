"""Weights that are no numbers: NaN and Inf in what is stored or written, and values too large for the target's dtype.

The bits tell: of all floats of a sign, NaN and Inf have the largest patterns. So one maximum over the words taken as
unsigned and one over them as signed integers show whether there is any; only then they are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct

from shardtool.errors import CheckpointError
from shardtool.execute.numbers import numpy, numpy_dtype
from shardtool.execute.tiles import Sources, Workspace
from shardtool.formats.stored import ITEMSIZE, Stored
from shardtool.layout.layout import Key

STEP = 1 << 20  # bytes looked at at once: they stay in the cache
# the pattern of Inf, of the smallest NaN where there is no Inf
INF: dict[str, int] = {
    "float64": 0x7FF0 << 48, "float32": 0x7F80 << 16, "float16": 0x7C00, "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C,
}  # fmt: skip
# (stored, written) -> the smallest pattern that is rounded to Inf
BEYOND: dict[tuple[str, str], int] = {
    ("float32", "float16"): 0x477FF000, ("bfloat16", "float16"): 0x4780, ("float32", "bfloat16"): 0x7F7F8000,
    ("float64", "float16"): 0x40EFFE00 << 32, ("float64", "bfloat16"): 0x47EFF000 << 32,
    ("float64", "float32"): 0x47EFFFFFF0000000,
}  # fmt: skip


class NotFinite(Struct, frozen=True):
    """A tensor with values that are no numbers: how many of each kind, of how many elements.

    `beyond` counts numbers that would become Inf in the dtype that is written.
    """

    key: Key
    nan: int
    inf: int
    beyond: int
    total: int

    def __str__(self) -> str:
        place = f"{self.key[1]}{' in ' + self.key[0] if self.key[0] else ''}"
        if self.beyond and not self.nan and not self.inf:
            return f"{place}: {self.beyond} of {self.total} elements beyond the range of the dtype"
        kinds = ((self.nan, "NaN"), (self.inf, "Inf"), (self.beyond, "beyond the range of the dtype"))
        found = (
            ", ".join(f"{count} {kind}" for count, kind in kinds if count)
            or "NaN or Inf in what is computed for it, out"
        )
        return f"{place}: {found} of {self.total} elements"


class Passing:
    """Looks at the bytes of one tensor as they pass, in order, cut anywhere; tensors of other dtypes pass unseen."""

    __slots__ = ("_cut", "_dtype", "_inf", "_width", "found")

    def __init__(self, dtype: str) -> None:
        self._width, self._inf = ITEMSIZE[dtype], INF.get(dtype, 0)
        self._dtype = numpy_dtype(dtype, values=False) if self._inf else None
        self._cut = b""  # of an element whose other bytes come next
        self.found = False

    def see(self, data: memoryview) -> None:
        """The next bytes."""
        if self._dtype is None or self.found:
            return
        if self._cut:
            lead = self._width - len(self._cut)
            self._cut += bytes(data[:lead])
            if len(self._cut) < self._width:
                return
            self._look(memoryview(self._cut))
            data, self._cut = data[lead:], b""
        if rest := len(data) % self._width:
            self._cut, data = bytes(data[-rest:]), data[:-rest]
        if len(data):
            self._look(data)

    def _look(self, data: memoryview) -> None:
        words = numpy().frombuffer(data, self._dtype)
        self.found |= _exceeds(words, self._width, self._inf)


def _exceeds(words: Any, width: int, least: int) -> bool:
    """Whether any float's pattern without its sign is `least` or larger."""
    sign = 1 << (8 * width - 1)
    return bool(words.max() >= sign + least or words.view(f"i{width}").max() >= least)


def scan(
    keys: Iterable[Key], locate: Callable[[Key], Stored], written: Mapping[Key, str] | None = None, *, jobs: int = 2
) -> list[NotFinite]:
    """The tensors that hold NaN or Inf, or with `written` (their target's dtype) numbers that it cannot hold.

    Every payload is read once. Integers and quantised tensors, whose values are not stored, are passed over.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - slow to import, and seldom needed

    sources = Sources()

    def one(key: Key) -> NotFinite | None:
        stored = locate(key)
        if stored.dtype not in INF or stored.quantised is not None or 0 in stored.shape:
            return None
        return _tensor(key, stored, (written or {}).get(key, stored.dtype), Workspace(sources))

    try:
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            return [found for found in pool.map(one, keys) if found is not None]
    finally:
        sources.close()


def _tensor(key: Key, stored: Stored, written: str, space: Workspace) -> NotFinite | None:
    width, inf = ITEMSIZE[stored.dtype], INF[stored.dtype]
    least, sign = min(inf, BEYOND.get((stored.dtype, written), inf)), 1 << (8 * width - 1)
    nan = infinite = beyond = 0
    for words in _words(stored, space) if stored.strides is None else _strided(stored):
        if not _exceeds(words, width, least):
            continue
        bits = words & words.dtype.type(sign - 1)
        no_number = int((bits >= inf).sum())
        infinities = 0 if stored.dtype == "float8_e4m3fn" else int((bits == inf).sum())
        nan, infinite = nan + no_number - infinities, infinite + infinities
        beyond += int((bits >= least).sum()) - no_number
    return NotFinite(key, nan, infinite, beyond, stored.nbytes // width) if nan or infinite or beyond else None


def _words(stored: Stored, space: Workspace) -> Iterator[Any]:
    """The elements of a row-major tensor as unsigned integers, in pieces."""
    kind = numpy_dtype(stored.dtype, values=False)
    for low in range(0, stored.nbytes, STEP):
        view = space.buffer("finite", STEP)[: min(STEP, stored.nbytes - low)]
        space.read_into(stored.file, stored.offset + low, view)
        yield numpy().frombuffer(view, kind)


def _strided(stored: Stored) -> Iterator[Any]:
    """The same for a tensor that is stored in another order."""
    np, kind = numpy(), numpy_dtype(stored.dtype, values=False)
    strides = stored.strides or ()
    span = 1 + sum((size - 1) * step for size, step in zip(stored.shape, strides, strict=True))
    flat = np.memmap(stored.file, kind, "r", stored.offset, (span,))
    whole = np.lib.stride_tricks.as_strided(flat, stored.shape, [step * kind.itemsize for step in strides])
    rows = max(1, STEP // max(1, stored.nbytes // stored.shape[0]))
    for row in range(0, stored.shape[0], rows):
        yield np.ascontiguousarray(whole[row : row + rows])


def lines(found: list[NotFinite]) -> tuple[str, ...]:
    """A line for each tensor, of many the first."""
    return tuple(map(str, found[:20])) + ((f"and {len(found) - 20} tensors more",) if len(found) > 20 else ())


def refuse(found: list[NotFinite], path: str, locate: Callable[[Key], Stored]) -> None:
    """Raises CheckpointError naming the tensors, if there are any, and their file where it is one; else `path`."""
    if found:
        files = {locate(item.key).file for item in found}
        where = files.pop() if len(files) == 1 else path
        only_beyond = all(item.beyond and not item.nan and not item.inf for item in found)
        raise CheckpointError(
            "weights that the dtype cannot hold" if only_beyond else "weights that are no numbers",
            where=where,
            details=lines(found),
            hint="choose another --dtype, or --allow-nan, which makes them infinite"
            if only_beyond
            else "the training has diverged, or a file is damaged; `shardtool inspect --values` lists all of them, "
            "--allow-nan takes them as they are",
        )
