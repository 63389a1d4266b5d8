"""A pickle machine that builds plain values and runs nothing.

Python's own unpickler imports what a pickle names and lets it reach into the objects it has built. This one knows the
opcodes of protocols 2 to 5, takes every name through `inert.resolve`, and has no other way out: no import, no call, no
attribute of a Python object. What it builds has a budget in proportion to the bytes that describe it, so neither memory
nor time is a multiple of what an honest file of that size takes.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sized

from shardtool.errors import GET_AGAIN, CheckpointError
from shardtool.formats.inert import Inert, TensorRef, call, key_cost, resolve, storage

_I2 = struct.Struct("<H").unpack_from
_I4 = struct.Struct("<i").unpack_from
_U4 = struct.Struct("<I").unpack_from
_U8 = struct.Struct("<Q").unpack_from
_F8 = struct.Struct(">d").unpack_from

# What a pickle may cost, in bytes of memory and steps of work alike; torch's and Megatron's cost 15 per byte
BUDGET, BUDGET_PER_BYTE = 32 << 20, 40
CONTAINER, OBJECT, SET, MEMO, ITEM = 64, 256, 224, 100, 64


def loads(data: bytes, where: str, *, storages: bool = False) -> object:
    """The value that a pickle describes; `where` names it in errors.

    Lists, dicts (OrderedDict too), tuples (torch.Size too) and scalars come as themselves, tensors as TensorRef if
    `storages` says that the pickle lies in a torch zip, dtypes as DType and objects as Inert.

    Raises CheckpointError for a name outside the allow list and for bytes that are no complete pickle.
    """
    machine = _Machine(data, where, storages)
    try:
        return _run(machine)
    except CheckpointError:
        raise
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, struct.error) as error:
        found = _told(error)
    except (MemoryError, RecursionError) as error:
        found = f"{type(error).__name__}"
    raise CheckpointError(
        "the pickled part of the file cannot be read",
        where=f"{where}, byte {machine.pos}",
        found=found[:200],
        hint=GET_AGAIN,
    )


def _told(error: Exception) -> str:
    """What is wrong, in this module's own words or Python's."""
    if isinstance(error, IndexError | struct.error):
        return "the pickle is cut off, or takes values that it has not made"
    if isinstance(error, KeyError):
        return "it refers to a value that it has not kept"
    if isinstance(error, UnicodeDecodeError):
        return "a text that is not UTF-8"
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


class _Machine:
    __slots__ = ("data", "left", "marks", "memo", "pos", "stack", "storages", "where")

    def __init__(self, data: bytes, where: str, storages: bool) -> None:
        self.data = data
        self.where = where
        self.storages = storages
        self.pos = 0
        self.left = BUDGET + BUDGET_PER_BYTE * len(data)
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}  # a dict: a huge index costs nothing, an unknown one is a KeyError


def _run(machine: _Machine) -> object:
    data, table = machine.data, _TABLE
    while True:
        code = data[machine.pos]
        machine.pos += 1
        if code == _STOP:
            if machine.marks or len(machine.stack) != 1:
                raise ValueError("the pickle stops before its value is complete")
            return machine.stack[0]
        operation = table.get(code)
        if operation is None:
            raise ValueError(f"unexpected opcode 0x{code:02x}")
        operation(machine)
        if machine.left < 0:
            _exhausted()


def _exhausted() -> None:
    raise ValueError("it describes more than a file of its size may")


def _spend(machine: _Machine, cost: int) -> None:
    """Take a cost from the budget before it arises."""
    machine.left -= cost
    if machine.left < 0:
        _exhausted()


def _take(machine: _Machine, count: int) -> bytes:
    start = machine.pos
    machine.pos = start + count
    if count < 0 or machine.pos > len(machine.data):
        raise ValueError("the pickle is cut off")
    return machine.data[start : machine.pos]


def _line(machine: _Machine) -> str:
    end = machine.data.find(b"\n", machine.pos)
    if end < 0:
        raise ValueError("the pickle is cut off")
    text = machine.data[machine.pos : end].decode()
    machine.pos = end + 1
    return text


def _pop_mark(machine: _Machine) -> list[object]:
    items = machine.stack
    machine.stack = machine.marks.pop()
    return items


def _constant(value: object) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _mark(machine: _Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _proto(machine: _Machine) -> None:
    if not 2 <= _take(machine, 1)[0] <= 5:
        raise ValueError("an unknown pickle protocol")


def _frame(machine: _Machine) -> None:
    _take(machine, 8)  # the frame's length; the bytes are all here anyway


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        _pop_mark(machine)


def _drop(machine: _Machine) -> None:
    _pop_mark(machine)


def _binint(machine: _Machine) -> None:
    machine.stack.append(_I4(machine.data, machine.pos)[0])
    machine.pos += 4


def _binint1(machine: _Machine) -> None:
    machine.stack.append(machine.data[machine.pos])
    machine.pos += 1


def _binint2(machine: _Machine) -> None:
    machine.stack.append(_I2(machine.data, machine.pos)[0])
    machine.pos += 2


def _long1(machine: _Machine) -> None:
    machine.stack.append(int.from_bytes(_take(machine, _take(machine, 1)[0]), "little", signed=True))


def _binfloat(machine: _Machine) -> None:
    machine.stack.append(_F8(machine.data, machine.pos)[0])
    machine.pos += 8


def _size1(machine: _Machine) -> int:
    return _take(machine, 1)[0]


def _size4(machine: _Machine) -> int:
    size: int = _U4(_take(machine, 4))[0]
    return size


def _size8(machine: _Machine) -> int:
    size: int = _U8(_take(machine, 8))[0]
    return size


def _text(size: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    # surrogatepass: what Python's own pickler writes
    return lambda machine: machine.stack.append(str(_take(machine, size(machine)), "utf-8", "surrogatepass"))


def _binary(size: Callable[[_Machine], int], kind: type[bytes] | type[bytearray]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(kind(_take(machine, size(machine))))


def _empty(kind: type[list[object]] | type[dict[object, object]] | type[set[object]]) -> Callable[[_Machine], None]:
    cost = SET if kind is set else CONTAINER

    def operation(machine: _Machine) -> None:
        machine.left -= cost
        machine.stack.append(kind())

    return operation


def _tuple(machine: _Machine) -> None:
    items = _pop_mark(machine)
    machine.left -= CONTAINER
    machine.stack.append(tuple(items))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError("an empty stack")
        machine.left -= CONTAINER
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return operation


def _list(machine: _Machine) -> None:
    items = _pop_mark(machine)
    machine.left -= CONTAINER
    machine.stack.append(items)


def _dict(machine: _Machine) -> None:
    items = _pop_mark(machine)
    made: dict[object, object] = {}
    machine.left -= CONTAINER
    _fill(machine, made, items)
    machine.stack.append(made)


def _frozenset(machine: _Machine) -> None:
    items = _pop_mark(machine)
    made: set[object] = set()
    machine.left -= SET
    _add(machine, made, items)
    machine.stack.append(frozenset(made))


def _fill(machine: _Machine, target: object, items: list[object]) -> None:
    if isinstance(target, Inert):
        target = target.entries
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items are set on something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            _spend(machine, key_cost(key, len(target)))
        target[key] = value


def _extend(target: object, items: list[object]) -> None:
    if isinstance(target, Inert):
        target = target.items
    if not isinstance(target, list):
        raise ValueError("items are appended to something that is no list")
    target.extend(items)


def _add(machine: _Machine, target: object, items: list[object]) -> None:
    if not isinstance(target, set):
        raise ValueError("items are added to something that is no set")
    for item in items:
        _spend(machine, ITEM + key_cost(item, len(target)))
        target.add(item)


def _setitem(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _fill(machine, machine.stack[-1], [key, value])


def _setitems(machine: _Machine) -> None:
    items = _pop_mark(machine)
    _fill(machine, machine.stack[-1], items)


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    _extend(machine.stack[-1], [item])


def _appends(machine: _Machine) -> None:
    items = _pop_mark(machine)
    _extend(machine.stack[-1], items)


def _additems(machine: _Machine) -> None:
    items = _pop_mark(machine)
    _add(machine, machine.stack[-1], items)


def _global(machine: _Machine) -> None:
    module, name = _line(machine), _line(machine)
    machine.stack.append(resolve(module, name, machine.where))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("a global without a name")
    machine.stack.append(resolve(module, name, machine.where))


def _reduce(machine: _Machine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(args, tuple):
        raise ValueError("a call without arguments")
    # a call may copy each of its arguments, and an argument may be in the memo and come again and again
    _spend(machine, OBJECT + 8 * len(args))
    _spend(machine, sum(_size(item) for item in args))
    machine.stack.append(call(function, args, lambda cost: _spend(machine, cost)))


def _size(value: object) -> int:
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    return ITEM * len(value) if isinstance(value, Sized) else 0


def _newobj_ex(machine: _Machine) -> None:
    keywords = machine.stack.pop()
    _reduce(machine)
    made = machine.stack[-1]
    if isinstance(made, Inert) and isinstance(keywords, dict):
        made.state = keywords


def _build(machine: _Machine) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, Inert):
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            # (dict or None, slots): how objects with __slots__ are pickled
            first = state[0] if isinstance(state[0], dict) else {}
            _spend(machine, ITEM * (len(first) + len(state[1])))
            state = {**first, **state[1]}
        target.state = state
    elif not isinstance(target, dict | list | set | TensorRef):  # attributes of a container (_metadata) carry no weight
        raise ValueError("state is set on something that has none")


def _persistent(machine: _Machine) -> None:
    if not machine.storages:
        raise ValueError("a persistent id outside a torch file")
    machine.left -= OBJECT
    machine.stack.append(storage(machine.stack.pop()))


def _binput(machine: _Machine) -> None:
    machine.memo[machine.data[machine.pos]] = machine.stack[-1]
    machine.pos += 1  # at most 256 entries: no cost


def _long_binput(machine: _Machine) -> None:
    machine.left -= MEMO
    machine.memo[_size4(machine)] = machine.stack[-1]


def _memoize(machine: _Machine) -> None:
    machine.left -= MEMO
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _binget(machine: _Machine) -> None:
    machine.stack.append(machine.memo[machine.data[machine.pos]])
    machine.pos += 1


def _long_binget(machine: _Machine) -> None:
    machine.stack.append(machine.memo[_size4(machine)])


_STOP = pickle.STOP[0]
# Protocols 0 and 1 have opcodes of their own (text numbers, INST, EXT): no checkpoint writes them, so they are unknown.
_TABLE: dict[int, Callable[[_Machine], None]] = {
    code[0]: operation
    for code, operation in {
        pickle.PROTO: _proto, pickle.FRAME: _frame, pickle.MARK: _mark, pickle.POP: _pop, pickle.POP_MARK: _drop,
        pickle.NONE: _constant(None), pickle.NEWTRUE: _constant(True), pickle.NEWFALSE: _constant(False),
        pickle.BININT: _binint, pickle.BININT1: _binint1, pickle.BININT2: _binint2,
        pickle.LONG1: _long1, pickle.BINFLOAT: _binfloat,
        pickle.SHORT_BINUNICODE: _text(_size1), pickle.BINUNICODE: _text(_size4), pickle.BINUNICODE8: _text(_size8),
        pickle.SHORT_BINBYTES: _binary(_size1, bytes), pickle.BINBYTES: _binary(_size4, bytes),
        pickle.BINBYTES8: _binary(_size8, bytes), pickle.BYTEARRAY8: _binary(_size8, bytearray),
        pickle.EMPTY_TUPLE: _constant(()), pickle.TUPLE: _tuple, pickle.TUPLE1: _tuple_of(1),
        pickle.TUPLE2: _tuple_of(2), pickle.TUPLE3: _tuple_of(3),
        pickle.EMPTY_LIST: _empty(list), pickle.LIST: _list, pickle.APPEND: _append, pickle.APPENDS: _appends,
        pickle.EMPTY_DICT: _empty(dict), pickle.DICT: _dict, pickle.SETITEM: _setitem, pickle.SETITEMS: _setitems,
        pickle.EMPTY_SET: _empty(set), pickle.ADDITEMS: _additems, pickle.FROZENSET: _frozenset,
        pickle.GLOBAL: _global, pickle.STACK_GLOBAL: _stack_global, pickle.REDUCE: _reduce, pickle.NEWOBJ: _reduce,
        pickle.NEWOBJ_EX: _newobj_ex, pickle.BUILD: _build, pickle.BINPERSID: _persistent,
        pickle.BINPUT: _binput, pickle.LONG_BINPUT: _long_binput, pickle.MEMOIZE: _memoize,
        pickle.BINGET: _binget, pickle.LONG_BINGET: _long_binget,
    }.items()
}  # fmt: skip
