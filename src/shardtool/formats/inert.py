"""What a checkpoint's pickle may hold, as plain values: names, tensors as places, and inert objects.

Nothing here imports or calls what a pickle names. A name outside the lists below is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from math import prod
from pathlib import PurePosixPath
from typing import Any

from msgspec import Struct

from shardtool.errors import GET_AGAIN, CheckpointError, a_kind
from shardtool.formats.stored import ITEMSIZE


class Global(Struct, frozen=True):
    """A class or function that a pickle names. Only its name: it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class DType(Struct, frozen=True):
    """A torch dtype, by its name without the prefix."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


class StorageType(Struct, frozen=True):
    """The class of a storage; None for torch.storage.UntypedStorage, which counts in bytes."""

    dtype: str | None


class StorageRef(Struct, frozen=True):
    """A storage of the file that holds the pickle: record `data/<key>` with `nbytes` bytes."""

    key: str
    dtype: str
    nbytes: int


class TensorRef(Struct, frozen=True):
    """A tensor as its pickle describes it: a strided window (in elements) on the record `data/<storage_key>`."""

    storage_key: str
    dtype: str
    offset_elements: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_nbytes: int


class Inert:
    """An object of a class that is not loaded: which class, what it was made from, and its state.

    Attributes of the pickled object are read through (`chunk.offsets`); two inert objects are equal only if identical.
    """

    __slots__ = ("args", "entries", "items", "kind", "state")

    def __init__(self, kind: Global, args: tuple[object, ...] = ()) -> None:
        self.kind = kind
        self.args = args
        self.state: object = None
        self.items: list[object] = []  # what APPEND gave a list subclass
        self.entries: dict[object, object] = {}  # what SETITEM gave a dict subclass

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        raise AttributeError(f"{self.kind} has no attribute {name}")

    def __repr__(self) -> str:
        return f"<inert {self.kind}>"


# torch/storage.py, _dtype_to_storage_type_map; newer dtypes use UntypedStorage and _rebuild_tensor_v3
STORAGE_DTYPES: dict[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64",
}  # fmt: skip
_WIDTH = ITEMSIZE | {"complex64": 8, "complex128": 16}
_DTYPES = frozenset(_WIDTH) | {
    "double", "float", "half", "long", "int", "short", "cfloat", "cdouble", "complex32", "qint8", "quint8", "qint32",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2",
}  # fmt: skip
_ALIASES = {
    "double": "float64", "float": "float32", "half": "float16", "long": "int64", "int": "int32", "short": "int16",
}  # fmt: skip
_TORCH_VALUES = frozenset({"strided", "sparse_coo", "contiguous_format", "channels_last", "preserve_format"})

# Kept as inert objects: their classes belong to the program that saved, and a converter needs at most their state.
_INERT_MODULES = (
    "megatron", "transformer_engine", "transformer_engine_torch", "torch.distributed", "torch._utils", "torch._tensor",
    "torch.nn", "torch.optim", "apex", "modelopt", "nemo", "nvidia_resiliency_ext", "deepspeed", "numpy.dtypes",
    "transformers.training_args", "transformers.trainer_utils",
)  # fmt: skip
_INERT_NAMES = frozenset({
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "signal.Signals", "datetime.datetime", "datetime.timedelta", "datetime.date",
    "datetime.timezone", "uuid.UUID", "decimal.Decimal", "_io.BytesIO", "io.BytesIO", "torch.Generator",
    "torch._C.Generator", "torch.Tensor", "torch.random.Generator",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer",
    "numpy.ndarray", "numpy.dtype", "builtins.object", "__builtin__.object",
})  # fmt: skip

Spend = Callable[[int], None]  # takes a cost from the budget of a pickle; raises ValueError when there is none left

MAX_DIMS = 64  # of a tensor, as in torch
MAX_SETTINGS = 1_000_000  # values in the settings of one file, each place counted


def resolve(module: str, name: str, where: str) -> object:
    """The value that stands for `module.name` in a pickle, without looking it up.

    Raises CheckpointError, naming it, for everything that a checkpoint has no use for.
    """
    path = f"{module}.{name}"
    if module == "torch":
        if name in _DTYPES:
            return DType(_ALIASES.get(name, name))
        if name in _TORCH_VALUES:
            return Global(module, name)
    if module in ("torch", "torch.cuda") and name in STORAGE_DTYPES:
        return StorageType(STORAGE_DTYPES[name])
    if path in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
        return StorageType(None)
    inert = any(module == known or module.startswith(f"{known}.") for known in _INERT_MODULES)
    if path in CALLS or path in _INERT_NAMES or inert:
        return Global(module, name)
    raise CheckpointError(
        "the file asks Python to load something that a checkpoint has no use for",
        where=where,
        expected="tensors, containers and settings",
        found=path,
        hint="do not torch.load this file; ask its author for safetensors, or for a state dict of tensors only",
    )


def call(function: object, args: tuple[object, ...], spend: Spend) -> object:
    """What `function(*args)` of a pickle stands for. Runs no code but this module's.

    The caller has paid for one copy of each argument; `spend` takes the cost of what goes beyond that.
    """
    if isinstance(function, Global):
        known = CALLS.get(str(function))
        return known(args, spend) if known else Inert(function, args)
    raise ValueError(f"{a_kind(function)} is called")


def key_cost(value: object, held: int) -> int:
    """What it costs at most to make a value a key of a dict that holds `held` keys, or a member of such a set.

    The hashes of text are secret, those of objects their addresses, and small integers spread by themselves; all other
    keys could be chosen so that each collides with all before. Raises ValueError where a value cannot be a key, and for
    tuples that are deep or long: hashing these takes a time that their bytes do not tell.
    """
    if value is None or isinstance(value, str | bytes | Global | DType | Inert):
        return 0
    if isinstance(value, int | float):
        return 0 if isinstance(value, int) and abs(value) < 2**53 else held
    if isinstance(value, tuple | frozenset) and _shallow(value):
        return 300 + held
    raise ValueError("a key that cannot be hashed")


def _shallow(value: tuple[object, ...] | frozenset[object], depth: int = 0) -> bool:
    return len(value) <= 16 and all(
        (depth == 0 and _shallow(item, 1))
        if isinstance(item, tuple | frozenset)
        else item is None or isinstance(item, str | bytes | int | float | Global | DType | Inert)
        for item in value
    )


def brief(value: object) -> str:
    """A value for an error text: scalars as they are, others by kind and size (a few shared lists can unfold to 2**64)."""
    if value is None or isinstance(value, bool | int | float | str | bytes | bytearray | Global | DType | Inert):
        return repr(value[:80] if isinstance(value, str | bytes | bytearray) else value)[:80]
    if isinstance(value, tuple | list) and len(value) <= 8 and all(isinstance(item, int | str) for item in value):
        return repr(value)[:80]
    if isinstance(value, Sized):
        return f"{a_kind(value)} with {len(value)} entr{'y' if len(value) == 1 else 'ies'}"
    return a_kind(value)


def plain(value: object, where: str = "", *, _depth: int = 0, _budget: list[int] | None = None) -> Any:
    """A value as JSON-like data: namespaces as dicts, dtypes as 'torch.bfloat16', other objects as their class's name.

    Raises CheckpointError for a value too deep or too large to be settings (a few shared lists can unfold to 2**64).
    """
    budget = [MAX_SETTINGS] if _budget is None else _budget
    budget[0] -= 1
    if _depth > 64 or budget[0] < 0:
        raise CheckpointError("the settings in the file are nested beyond reason", where=where, hint=GET_AGAIN)
    if isinstance(value, Inert):
        return _plain_inert(value, where, _depth, budget)
    if isinstance(value, dict):
        return {_plain_key(key): plain(item, where, _depth=_depth + 1, _budget=budget) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(item, where, _depth=_depth + 1, _budget=budget) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return _plain_scalar(value)


def _plain_scalar(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, bytearray):
        return bytes(value)
    return f"tensor {value.dtype} {list(value.shape)}" if isinstance(value, TensorRef) else str(value)


def _plain_inert(value: Inert, where: str, depth: int, budget: list[int]) -> Any:
    if value.kind.name in ("Namespace", "SimpleNamespace"):
        return plain(value.state or {}, where, _depth=depth + 1, _budget=budget)
    if value.kind.module.startswith("pathlib"):
        return str(PurePosixPath(*(part for part in value.args if isinstance(part, str))))
    return str(value.kind)


def _plain_key(key: object) -> object:
    return str(key) if isinstance(key, Inert | Global | DType) else key


# --- what stands for the calls of a pickle ---------------------------------------------------------------------------


def _sizes(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMS:
        raise ValueError(f"a tensor's {what} is {brief(value)}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError(f"a tensor's {what} is {brief(value)}")
    return tuple(value)


def _tensor(args: tuple[object, ...], _spend: Spend, dtype: str | None = None) -> TensorRef:
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, StorageRef) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor has no storage")
    sizes, steps = _sizes(shape, "shape"), _sizes(strides, "strides")
    if len(sizes) != len(steps) or prod(sizes) >= 2**63:
        raise ValueError(f"a tensor's shape {sizes} does not fit its strides {steps}")
    return TensorRef(storage.key, dtype or storage.dtype, offset, sizes, steps, storage.nbytes)


def _tensor_v3(args: tuple[object, ...], spend: Spend) -> TensorRef:
    dtype = args[6]
    if not isinstance(dtype, DType):
        raise ValueError("a tensor has no dtype")
    return _tensor(args, spend, dtype.name)


def _first(args: tuple[object, ...], _spend: Spend) -> object:
    return args[0]


def _from_type(args: tuple[object, ...], spend: Spend) -> object:
    # torch._tensor._rebuild_from_type_v2(function, type, args, state): a tensor with Python attributes, or a subclass
    function, kind, inner, _state = args
    if not isinstance(inner, tuple):
        raise ValueError("a tensor subclass without arguments")
    if isinstance(kind, Global) and str(kind) in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        return call(function, inner, spend)
    return Inert(kind if isinstance(kind, Global) else Global("torch", "Tensor"), (function, inner))


def _size(args: tuple[object, ...], _spend: Spend) -> tuple[int, ...]:
    return _sizes(args[0], "size") if args else ()


def _encode(args: tuple[object, ...], _spend: Spend) -> bytes:
    # how protocol 2 writes bytes: _codecs.encode(text, "latin1")
    text, encoding = args if len(args) == 2 else (args[0], "utf-8")
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise ValueError("bytes in an unknown encoding")
    return text.encode(str(encoding))


def _bytearray(args: tuple[object, ...], spend: Spend) -> bytearray:
    if not args:
        return bytearray()
    if isinstance(args[0], bytes):
        return bytearray(args[0])
    return bytearray(_encode(args, spend))


def _members(args: tuple[object, ...], spend: Spend) -> list[object]:
    if not args:
        return []
    if not isinstance(args[0], list | tuple | set | frozenset):
        raise ValueError("a set of things that cannot be hashed")
    for number, item in enumerate(args[0]):
        spend(32 + key_cost(item, number))
    return list(args[0])


def _dictionary(args: tuple[object, ...], spend: Spend) -> dict[object, object]:
    source = args[0] if args else None
    pairs = list(source.items()) if isinstance(source, dict) else _list(args, spend)
    result: dict[object, object] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError("a dict of something else than pairs")
        spend(64 + key_cost(pair[0], len(result)))
        result[pair[0]] = pair[1]
    return result


def _getattr(args: tuple[object, ...], _spend: Spend) -> Inert:
    # Python 3.11.0 to 3.11.3 pickle an enum member as getattr(class, name): allowed of an inert class, and nothing runs
    owner, name = args
    if isinstance(owner, Global) and str(owner) not in CALLS and isinstance(name, str):
        return Inert(owner, (name,))
    raise ValueError(f"builtins.getattr of {brief(name)}")


def _reconstructor(args: tuple[object, ...], spend: Spend) -> object:
    kind = args[0]
    if not isinstance(kind, Global):
        raise ValueError("an object without a class")
    return call(kind, (), spend)


def _describe(name: str) -> Callable[[tuple[object, ...], Spend], object]:
    return lambda args, _spend: Inert(Global("builtins", name), args)


def _device(args: tuple[object, ...], _spend: Spend) -> str:
    return ":".join(str(part)[:40] for part in args[:2] if isinstance(part, str | int))


def _layout(args: tuple[object, ...], _spend: Spend) -> str:
    return args[0][:40] if isinstance(args[0], str) else "a layout"


def _list(args: tuple[object, ...], _spend: Spend) -> list[object]:
    return list(args[0]) if args and isinstance(args[0], list | tuple) else []


CALLS: dict[str, Callable[[tuple[object, ...], Spend], object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda _args, _spend: {},
    "collections.Counter": _dictionary,
    "collections.deque": _list,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
    **{
        f"{module}.{name}": function
        for module in ("builtins", "__builtin__")
        for name, function in {
            "set": lambda args, spend: set(_members(args, spend)),
            "frozenset": lambda args, spend: frozenset(_members(args, spend)),
            "bytes": lambda args, spend: bytes(_bytearray(args, spend)),
            "bytearray": _bytearray,
            "slice": _describe("slice"),
            "complex": _describe("complex"),
            "range": _describe("range"),
            "list": _list,
            "dict": _dictionary,
            "getattr": _getattr,
        }.items()
    },
}


def storage(saved: object) -> StorageRef:
    """The storage of a persistent id ('storage', class, key, location, numel), torch/serialization.py persistent_id.

    Raises ValueError for anything else.
    """
    if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] != "storage":
        raise ValueError("an unknown persistent id")
    _, kind, key, _location, numel = saved
    if not isinstance(kind, StorageType) or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise ValueError("an unknown storage")
    if len(key) > 40 or numel >= 2**63:
        raise ValueError("an unknown storage")
    dtype = kind.dtype or "uint8"
    return StorageRef(key, dtype, numel * _WIDTH[dtype])
