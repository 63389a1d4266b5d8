"""Writes protocol 2 pickles that torch.load accepts, without torch.

A tensor is written as torch.save writes it: `torch._utils._rebuild_tensor_v2` on a persistent id
('storage', torch.FloatStorage, key, 'cpu', numel), numel in elements; the dtypes without a storage class of their own
take `_rebuild_tensor_v3` on an UntypedStorage, numel in bytes (torch/serialization.py and torch/_tensor.py, 2.13).
"""

from __future__ import annotations

import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from math import prod
from typing import Any

from msgspec import Struct

from shardtool.formats.inert import STORAGE_DTYPES, DType, Global
from shardtool.formats.stored import ITEMSIZE, row_major_strides

_STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_U4 = struct.Struct("<I").pack
_I4 = struct.Struct("<i").pack
_F8 = struct.Struct(">d").pack
_SHORT_TUPLE = (b")", b"\x85", b"\x86", b"\x87")
HELD_PARTS = 4096  # opcodes that are collected before they are written
_ORDERED = Global("collections", "OrderedDict")
_NAMESPACE = Global("argparse", "Namespace")


class Call(Struct, frozen=True):
    """The result of `function(*args)`, written as REDUCE."""

    function: Global
    args: tuple[object, ...] = ()


class Object(Struct, frozen=True, eq=False):
    """An instance of a class, made without arguments and given `state`: NEWOBJ and BUILD (no BUILD if None).

    Equal only to itself, so that it can be a key of the dict that is written.
    """

    kind: Global
    state: object = None


class TensorOut(Struct, frozen=True):
    """A contiguous tensor on a storage of its own; the same key twice is the same storage.

    `key` is the caller's name for the payload; the file numbers its storages itself. `residue` is where the payload has
    to begin in the archive, modulo BLOCK; -1: where torch puts it.
    """

    key: Hashable
    dtype: str
    shape: tuple[int, ...]
    residue: int = -1


class Items(Struct, frozen=True, eq=False):
    """A list whose items are made while it is written."""

    items: Iterable[object]


class Pairs(Struct, frozen=True, eq=False):
    """A dict whose keys and values are made while it is written."""

    pairs: Iterable[tuple[object, object]]


class _Out:
    __slots__ = ("append", "globals", "memo", "parts", "storages", "tails", "write")

    def __init__(self, write: Callable[[bytes], object] | None = None) -> None:
        self.parts: list[bytes] = []
        self.append = self.parts.append
        self.write = write
        self.memo: dict[object, bytes] = {}
        self.globals: dict[int, tuple[Global, bytes]] = {}
        self.storages: dict[Hashable, tuple[int, TensorOut]] = {}
        self.tails: dict[tuple[str, tuple[int, ...]], tuple[bytes, bytes]] = {}


def dumps(value: object) -> tuple[bytes, list[TensorOut]]:
    """The pickle of a value, and its tensors: tensor i lies on the storage with key str(i).

    Takes None, bool, int, float, str, bytes, list, tuple, set, dict, OrderedDict, argparse.Namespace, Global, DType,
    Call, Object, TensorOut, Items and Pairs. Raises TypeError for anything else.
    """
    out = _Out()
    _whole(out, value)
    return b"".join(out.parts), [tensor for _, tensor in out.storages.values()]


def dump(value: object, write: Callable[[bytes], object]) -> None:
    """Hand the pickle of a value to `write`, piece by piece: it is never in memory as a whole."""
    out = _Out(write)
    _whole(out, value)
    write(b"".join(out.parts))


def _whole(out: _Out, value: object) -> None:
    out.append(b"\x80\x02")
    _emit(out, value)
    out.append(b".")


def _hand_on(out: _Out) -> None:
    """Write what has been collected: opcodes are small, and each one is an object of its own until then."""
    if out.write is not None:
        out.write(b"".join(out.parts))
        out.parts.clear()


def _emit(out: _Out, value: object) -> None:
    writer = _WRITERS.get(type(value), _refuse)
    writer(out, value)


def _refuse(_: _Out, value: object) -> None:
    raise TypeError(f"{type(value).__name__} has no place in a checkpoint")


def _bool(out: _Out, value: bool) -> None:
    out.append(b"\x88" if value else b"\x89")


def _float(out: _Out, value: float) -> None:
    out.append(b"G" + _F8(value))


def _global(out: _Out, value: Global) -> None:
    # by identity first: hashing a Global takes longer than all the rest, and most are constants of their writers
    known = out.globals.get(id(value))
    if known is None:
        first = _once(out, value, f"c{value.module}\n{value.name}\n".encode())
        out.append(first)
        out.globals[id(value)] = (value, out.memo[value])
    else:
        out.append(known[1])


@lru_cache
def _torch(name: str) -> Global:
    return Global("torch", name)  # one object for each: `_global` keeps all that it meets


def _ordered(out: _Out, value: OrderedDict[object, object]) -> None:
    _global(out, _ORDERED)
    out.append(b")R")
    _items(out, value)


def _plain_dict(out: _Out, value: dict[object, object]) -> None:
    out.append(b"}")
    _items(out, value)


def _namespace(out: _Out, value: Namespace) -> None:
    _object(out, Object(_NAMESPACE, vars(value)))


def _call(out: _Out, value: Call) -> None:
    _global(out, value.function)
    _tuple(out, value.args)
    out.append(b"R")


def _object(out: _Out, value: Object) -> None:
    _global(out, value.kind)
    out.append(b")\x81")
    if value.state is not None:
        _state(out, value.state)
        out.append(b"b")


def _bytes(out: _Out, value: bytes) -> None:
    # protocol 2 has no bytes: _codecs.encode(text, "latin1"), as Python's pickler does
    _call(out, Call(Global("_codecs", "encode"), (value.decode("latin1"), "latin1")))


def _set(out: _Out, value: set[object]) -> None:
    _call(out, Call(Global("__builtin__", "set"), (sorted(value, key=repr),)))


def _once(out: _Out, key: object, first: bytes) -> bytes:
    """`first` and a memo entry the first time, the reference to it later."""
    known = out.memo.get(key)
    if known is not None:
        return known
    index = len(out.memo)
    out.memo[key] = b"h" + bytes((index,)) if index < 256 else b"j" + _U4(index)
    return first + (b"q" + bytes((index,)) if index < 256 else b"r" + _U4(index))


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + _U4(len(data)) + data


@lru_cache(maxsize=4096)
def integer(value: int) -> bytes:
    """The opcodes of an int."""
    if 0 <= value < 1 << 8:
        return b"K" + bytes((value,))
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + _I4(value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) > 255:
        raise TypeError("an int of more than 2000 bits has no place in a checkpoint")
    return b"\x8a" + bytes((len(data),)) + data


def _list(out: _Out, value: list[object]) -> None:
    out.append(b"]")
    if value:
        out.append(b"(")
        for item in value:
            _emit(out, item)
        out.append(b"e")


def _tuple(out: _Out, value: tuple[object, ...]) -> None:
    short = len(value) <= 3
    if not short:
        out.append(b"(")
    for item in value:
        _WRITERS.get(type(item), _refuse)(out, item)
    out.append(_SHORT_TUPLE[len(value)] if short else b"t")


def _made_list(out: _Out, value: Items) -> None:
    out.append(b"]")
    begun = False
    for item in value.items:
        if not begun:
            out.append(b"(")
            begun = True
        _emit(out, item)
        if len(out.parts) > HELD_PARTS:
            _hand_on(out)
    if begun:
        out.append(b"e")


def _made_dict(out: _Out, value: Pairs) -> None:
    out.append(b"}")
    begun = False
    for key, item in value.pairs:
        if not begun:
            out.append(b"(")
            begun = True
        _emit(out, key)
        _emit(out, item)
        if len(out.parts) > HELD_PARTS:
            _hand_on(out)
    if begun:
        out.append(b"u")


def _items(out: _Out, value: dict[object, object]) -> None:
    if value:
        out.append(b"(")
        for key, item in value.items():
            _WRITERS.get(type(key), _refuse)(out, key)
            _WRITERS.get(type(item), _refuse)(out, item)
        out.append(b"u")


def _state(out: _Out, state: object) -> None:
    if not isinstance(state, dict):
        _emit(out, state)
        return
    out.append(b"}")
    if state:
        out.append(b"(")
        for name, item in state.items():
            # attribute names recur with every object of a class
            out.append(out.memo.get(name) or _once(out, name, _text(name)))
            _WRITERS.get(type(item), _refuse)(out, item)
        out.append(b"u")


def _ints(value: tuple[int, ...]) -> bytes:
    body = b"".join(map(integer, value))
    if len(value) <= 3:
        return body + _SHORT_TUPLE[len(value)]
    return b"(" + body + b"t"


def _tensor(out: _Out, tensor: TensorOut) -> None:
    number, known = out.storages.setdefault(tensor.key, (len(out.storages), tensor))
    if known is not tensor and (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
        raise TypeError(f"two tensors with the key {tensor.key!r}")
    kind = (tensor.dtype, tensor.shape)
    around = out.tails.get(kind)
    if around is None:
        # the first of a kind may bring memo entries with it; the next one must refer to them
        first = _around(out, tensor)
        out.tails[kind] = _around(out, tensor)
        around = first
    data = str(number).encode()
    out.append(around[0] + b"X" + _U4(len(data)) + data + around[1])


def _around(out: _Out, tensor: TensorOut) -> tuple[bytes, bytes]:
    """The opcodes before and after the storage key of a tensor."""
    typed = _STORAGES.get(tensor.dtype)
    numel = prod(tensor.shape)
    if typed is None:
        numel *= ITEMSIZE[tensor.dtype]

    def name(module: str, attribute: str) -> bytes:
        return _once(out, Global(module, attribute), f"c{module}\n{attribute}\n".encode())

    def text(value: str) -> bytes:
        return _once(out, value, _text(value))

    head = name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3") + b"((" + text("storage")
    head += name("torch", typed) if typed else name("torch.storage", "UntypedStorage")
    tail = text("cpu") + integer(numel) + b"tQK\x00" + _ints(tensor.shape) + _ints(row_major_strides(tensor.shape))
    tail += b"\x89" + name("collections", "OrderedDict") + b")R"
    if not typed:
        tail += name("torch", tensor.dtype)
    return head, tail + b"tR"


_WRITERS: dict[type, Callable[[_Out, Any], None]] = {
    type(None): lambda out, _: out.append(b"N"),
    bool: _bool,
    int: lambda out, value: out.append(integer(value)),
    float: _float,
    str: lambda out, value: out.append(_text(value)),
    bytes: _bytes,
    list: _list,
    tuple: _tuple,
    set: _set,
    dict: _plain_dict,
    OrderedDict: _ordered,
    Namespace: _namespace,
    Global: _global,
    DType: lambda out, value: _global(out, _torch(value.name)),
    Call: _call,
    Object: _object,
    TensorOut: _tensor,
    Items: _made_list,
    Pairs: _made_dict,
}
