"""What is broken: bytes, JSON trees, pickle opcodes, zip records, whole files. All of it follows from a seed."""

from __future__ import annotations

import io
import json
import pickletools
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CANARY = "canary"  # a command that creates this file is planted wherever code could run
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 15, 16, 17, 127, 128, 255, 256, 1000, 65535, 65536, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
)  # fmt: skip
TEXTS = ("", ".", "..", "../x", "/etc/passwd", "model.safetensors", "a\0b", "x" * 300, "\u0130", "../../release", "weight",
         "nan", "1e400", "F32", "F64", "BF16", "U8")  # fmt: skip


def some_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of bytes: bits, small integers, slices cut, doubled, moved or lost."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not made:
            return b"{}"
        # the ends of a file hold its structure: headers and directories
        near = min(len(made), rng.choice((64, 512, 4096, 1 << 30)))
        at = rng.randrange(near) if rng.random() < 0.5 else len(made) - 1 - rng.randrange(near)
        length = rng.choice((1, 2, 4, 8, 30, 46, 100, 1000))
        match rng.randrange(9):
            case 0 | 1 | 2:
                made[at] ^= 1 << rng.randrange(8)
            case 3:
                made[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, ord("."), ord("/"), rng.randrange(256)))
            case 4:
                width = rng.choice((2, 4, 8))
                value = rng.choice(NUMBERS) % (1 << 8 * width)
                made[at : at + width] = value.to_bytes(width, "little")
            case 5:
                del made[at : at + length]
            case 6:
                made[at:at] = made[at : at + length]
            case 7:
                other = rng.randrange(len(made))
                made[at : at + length] = made[other : other + length]
            case 8:
                del made[at if rng.random() < 0.7 else max(0, len(made) - length) :]
    return bytes(made)


# --- JSON ------------------------------------------------------------------------------------------------------------


class _Twice(dict[str, Any]):
    """A JSON object in which one name occurs twice."""

    def __init__(self, items: dict[str, Any], name: str, value: Any) -> None:
        super().__init__(items)
        self.name, self.value = name, value

    def items(self) -> Any:
        """The pairs, the second one of the name behind."""
        return [*super().items(), (self.name, self.value)]


def json_tree(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of a JSON tree; now and then of its bytes."""
    if rng.random() < 0.2:
        return some_bytes(data, rng)
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        tree = _changed(tree, rng)
    text = _dumps(tree)
    if rng.random() < 0.02:
        text = rng.choice(("[" * 100_000, '{"a":' * 50_000, text.replace("{", '{"deep":' + "[" * 5000, 1), " " * 10**6))
    return text.encode("utf-8", "surrogatepass")


def _changed(tree: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    if not places:
        return rng.choice(([], {}, None, 3, "x"))
    node, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice((*TEXTS, *(str(other) for _, other in places)))] = node.pop(key)
        case 2 if isinstance(node, dict) and node is tree:
            return _Twice(node, key, rng.choice((node[key], 1, None)))
        case 3:
            other, second = rng.choice(places)
            if second in other if isinstance(other, dict) else second < len(other):
                value = other[second]
                if not _inside(node, value):
                    node[key] = value
        case 4 if isinstance(node[key], int) and not isinstance(node[key], bool):
            node[key] = rng.choice(
                (node[key] + 1, node[key] - 1, node[key] * 2, -node[key], float(node[key]), rng.choice(NUMBERS))
            )
        case 5 if isinstance(node[key], str):
            node[key] = rng.choice((*TEXTS, node[key].upper(), node[key] + "x", "./" + node[key], node[key] + "\0"))
        case _:
            node[key] = rng.choice(
                (None, True, False, [], {}, "x", 1.5, -0.0, float("nan"), float("inf"), 1e300, [1, [2, [3]]], {"a": {"b": 1}},
                 rng.choice(NUMBERS), rng.choice(TEXTS))
            )  # fmt: skip
    return tree


def _inside(node: Any, value: Any) -> bool:
    if node is value:
        return True
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_inside(node, child) for child in children)


def _dumps(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{_dumps(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(_dumps, tree)) + "]"
    return json.dumps(tree)


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """Bytes, or the JSON of the header, with the length right or wrong."""
    if rng.random() < 0.4:
        return some_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header, payload = data[8 : 8 + size], data[8 + size :]
    header = json_tree(header, rng)
    header += b" " * (-len(header) % 8)
    length = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    match rng.randrange(10):
        case 0:
            payload = payload[: -rng.choice((1, 4, 64))]
        case 1:
            payload += bytes(rng.choice((1, 4, 64)))
    return length.to_bytes(8, "little") + header + payload


# --- pickles ---------------------------------------------------------------------------------------------------------

_TOUCH = f"touch {CANARY}".encode()
_OPEN = f"open({CANARY!r}, 'w')".encode()


def _text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


EVIL = (
    b"cos\nsystem\n" + _text(_TOUCH) + b"\x85R",
    b"cposix\nsystem\n" + _text(_TOUCH) + b"\x85R",
    _text(b"os") + _text(b"system") + b"\x93" + _text(_TOUCH) + b"\x85R",
    b"cbuiltins\neval\n" + _text(_OPEN) + b"\x85R",
    b"c__builtin__\nexec\n" + _text(_OPEN) + b"\x85R",
    b"(" + _text(_TOUCH) + b"ios\nsystem\n",
    b"(cos\nsystem\n" + _text(_TOUCH) + b"o",
    b"cos\nsystem\n" + _text(_TOUCH) + b"\x85\x81",
    b"cos\nsystem\n" + _text(_TOUCH) + b"\x85}\x92",
    b"csubprocess\nPopen\n(" + _text(b"touch") + _text(CANARY.encode()) + b"l\x85R",
    b"c__builtin__\ngetattr\nc__builtin__\n__import__\n" + _text(b"__call__") + b"\x86R",
    b"cmegatron.core.x\nThing\n" + _text(b"os.system") + b"\x85R",
    b"cfunctools\npartial\ncos\nsystem\n" + _text(_TOUCH) + b"\x86R",
    b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"Pos.system\n", b"NQ", b"\x97", b"\x98", b"2",
    b"coperator\nattrgetter\n" + _text(b"system") + b"\x85R",
    b"cargparse\nNamespace\n)\x81}" + _text(b"__class__") + b"cos\nsystem\nsb",
    b"ctorch._utils\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n" + _text(_TOUCH) + b"\x85NtR",
    b"ctorch.utils._config_module\nload_config\n" + _text(b"x") + b"\x85R",
    b"ctorch.jit\nload\n" + _text(b"x") + b"\x85R",
)  # fmt: skip


def _doubling(depth: int) -> bytes:
    # a list of the list before, twice, and so on: 2**depth elements in a few bytes
    steps = (bytes((200 + n % 50,)) for n in range(depth))
    return b"]" + b"".join(b"q" + memo + b"0]h" + memo + b"ah" + memo + b"a" for memo in steps)


BOMBS = (
    _doubling(45),
    b"\x8f" * 20_000 + b"0" * 19_999,
    b"]" * 20_000 + b"a" * 19_999,
    b")" + b"\x85" * 20_000,
    b"X\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x96\xff\xff\xff\xff\xff\xff\xff\x00",
    b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff",
    b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R", b"c__builtin__\nlist\n" + _doubling(40) + b"\x85R",
    b"c__builtin__\nrange\nJ\xff\xff\xff\x7f\x85R", b"c_codecs\nencode\n" + _text(b"x" * 1000) + _text(b"zip") + b"\x86R",
    b"ctorch\nSize\n" + _doubling(30) + b"\x85R", b"ctorch\ndevice\n" + _doubling(40) + b"\x85R",
    b"}" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"Ns" for n in range(1, 3000)),
)  # fmt: skip


def pickle_opcodes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of a pickle's opcodes; now and then of its bytes."""
    if rng.random() < 0.3:
        return some_bytes(data, rng)
    starts = [position for _, _, position in pickletools.genops(data)]
    ops = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(ops))
        match rng.randrange(8):
            case 0:
                del ops[at]
            case 1:
                ops.insert(at, ops[at])
            case 2:
                ops[at] = rng.choice(ops)
            case 3:
                ops.insert(at, rng.choice(EVIL))
            case 4:
                ops[at] = rng.choice(EVIL)
            case 5:
                ops.insert(at, rng.choice(BOMBS) + rng.choice((b"", b"0")))
            case 6:
                ops[at] = _number(rng)
            case 7:
                ops[at] = _other(ops[at], rng)
        if not ops:
            return b"."
    return b"".join(ops)


def _number(rng: random.Random) -> bytes:
    value = rng.choice(NUMBERS)
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(17, "little", signed=True)
    return b"\x8a" + bytes((len(raw),)) + raw


def _other(op: bytes, rng: random.Random) -> bytes:
    """The same opcode with another argument."""
    if op[:1] in (b"K", b"M", b"J"):
        return _number(rng)
    if op[:1] in (b"X", b"\x8c"):
        head = 5 if op[:1] == b"X" else 2
        text = op[head:]
        return _text(
            rng.choice((text.upper(), text[:-1], text + b"1", b"", b"\xff", *(item.encode() for item in TEXTS)))
        )
    if op[:1] == b"c":
        return rng.choice((b"ctorch\nfloat16\n", b"ctorch\nHalfStorage\n", b"ctorch\nLongStorage\n", b"cmegatron.core.x\nY\n",
                           b"ccollections\nOrderedDict\n", b"cos\nsystem\n"))  # fmt: skip
    return some_bytes(op, rng)


# --- zips ------------------------------------------------------------------------------------------------------------


def torch_zip(data: bytes, rng: random.Random) -> bytes:
    """Bytes, the pickle inside, or the records of a torch.save archive."""
    choice = rng.random()
    if choice < 0.3:
        return some_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    if choice < 0.75:
        records = [(name, pickle_opcodes(part, rng) if name.endswith("data.pkl") else part) for name, part in records]
        return _zip(records)
    if choice < 0.85:
        return _fields(data, rng)
    at = rng.randrange(len(records))
    name, part = records[at]
    compression = zipfile.ZIP_STORED
    match rng.randrange(9):
        case 0:
            del records[at]
        case 1:
            records.append((name, part[::-1]))
        case 2:
            records[at] = (
                rng.choice((name.upper(), "../" + name, "/" + name, name + "x", "data.pkl", "", "x/" + name)),
                part,
            )
        case 3:
            records[at] = (name, part[: rng.randrange(len(part) + 1)] + bytes(rng.choice((0, 1, 4, 64))))
        case 4:
            rng.shuffle(records)
        case 5:
            compression = zipfile.ZIP_DEFLATED
        case 6:  # a bomb: a record that unfolds to a hundred times its size
            compression = zipfile.ZIP_DEFLATED
            records[at] = (name, bytes(10**7))
        case 7:
            records.insert(0, (name.partition("/")[0] + "/constants.pkl", b""))
        case 8:
            records[at] = (name, data)  # an archive in the archive
    return _zip(records, compression)


def _zip(records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, part in records:
            archive.writestr(zipfile.ZipInfo(name), part, compression)
    return buffer.getvalue()


def _fields(data: bytes, rng: random.Random) -> bytes:
    """A field of a local header, a directory entry or an end record."""
    made = bytearray(data)
    magic, size = rng.choice(
        ((b"PK\x03\x04", 30), (b"PK\x01\x02", 46), (b"PK\x05\x06", 22), (b"PK\x06\x06", 56), (b"PK\x06\x07", 20))
    )
    places = [at for at in range(len(made) - size) if made[at : at + 4] == magic] or [0]
    at = rng.choice(places) + rng.randrange(4, size)
    width = rng.choice((2, 4, 8))
    value = (
        (int.from_bytes(made[at : at + width], "little") + rng.choice((1, -1, 8, 64)))
        if rng.random() < 0.5
        else rng.choice(NUMBERS)
    )
    made[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(made)


# --- files -----------------------------------------------------------------------------------------------------------


def files(paths: list[Path], rng: random.Random) -> None:
    """Whole files or folders: lost, emptied, exchanged, doubled, renamed, linked elsewhere."""
    one, other = rng.choice(paths), rng.choice(paths)
    match rng.randrange(7):
        case 0:
            shutil.rmtree(one) if one.is_dir() else one.unlink()
        case 1:
            target = next((path for path in one.rglob("*") if path.is_file()), None) if one.is_dir() else one
            if target is not None:
                target.write_bytes(b"")
        case 2 | 3:
            aside = one.with_name("aside")
            if one != other:
                one.rename(aside)
                other.rename(one)
                aside.rename(other)
        case 4:
            if one != other and one.is_dir() == other.is_dir():
                shutil.rmtree(one) if one.is_dir() else one.unlink()
                shutil.copytree(other, one) if other.is_dir() else shutil.copyfile(other, one)
        case 5:
            name = rng.choice(
                (one.name.upper(), one.name + "x", one.name.replace("0", "1"), one.name.replace("00", "7"))
            )
            if not one.with_name(name).exists():
                one.rename(one.with_name(name))
        case 6:
            outside = one.parents[1] / "outside"
            one.rename(outside)
            one.symlink_to(outside)


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": some_bytes, "json": json_tree, "safetensors": safetensors, "pickle": pickle_opcodes, "torch_zip": torch_zip,
}  # fmt: skip


def mutate(root: Path, pattern: str, kind: str, rng: random.Random) -> str:
    """Break one file of a checkpoint that matches; its name."""
    paths = sorted(root.glob(pattern))
    if kind == "files":
        files(paths, rng)
        return pattern
    path = rng.choice(paths)
    data = path.read_bytes()
    made = data
    while made == data:
        made = KINDS[kind](data, rng)
    path.write_bytes(made)
    return str(path.relative_to(root))
