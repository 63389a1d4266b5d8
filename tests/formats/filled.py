"""Files from skeletons: what the execution engine does, in the simplest way."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from shardtool.formats.stored import Skeleton, Stored

DATA = Path(__file__).parents[1] / "data" / "megatron-core"


def write(skeleton: Skeleton, path: Path, payload: Callable[[Hashable], bytes]) -> Path:
    """The file of a skeleton, its payload given by key."""
    with path.open("wb") as file:
        file.truncate(skeleton.size)
        for position, part in skeleton.parts:
            os.pwrite(file.fileno(), part, position)
        for key, place in skeleton.payload.items():
            content = payload(key)
            assert len(content) == place.nbytes
            os.pwrite(file.fileno(), content, place.offset)
            for position in place.crc_at:
                os.pwrite(file.fileno(), zlib.crc32(content).to_bytes(4, "little"), position)
    return path


def content(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def load(stored: Stored) -> torch.Tensor:
    """The tensor that lies at a place."""
    dtype = getattr(torch, stored.dtype)
    strides = stored.strides
    if 0 in stored.shape:
        return torch.empty(stored.shape, dtype=dtype)
    with Path(stored.file).open("rb") as file:
        file.seek(stored.offset)
        if strides is None:
            return torch.frombuffer(bytearray(file.read(stored.nbytes)), dtype=dtype).reshape(stored.shape)
        span = 1 + sum((size - 1) * step for size, step in zip(stored.shape, strides, strict=True))
        flat = torch.frombuffer(bytearray(file.read(span * dtype.itemsize)), dtype=dtype)
    return flat.as_strided(stored.shape, strides).clone()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, dtype and shape included."""
    return a.dtype == b.dtype and a.shape == b.shape and content(a) == content(b)


def sample(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor whose bytes are a function of its shape and dtype (valid values for bool)."""
    kind: Any = getattr(torch, dtype)
    count = int(torch.tensor(shape).prod()) if shape else 1
    flat = torch.arange(count * kind.itemsize, dtype=torch.int64).mul(37).remainder(2 if dtype == "bool" else 120)
    return flat.to(torch.uint8).view(kind).reshape(shape)
