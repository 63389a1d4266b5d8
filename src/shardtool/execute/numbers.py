"""numpy, where elements are looked at one by one; a conversion that only moves bytes does not import it."""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from typing import Any

from shardtool.formats.stored import ITEMSIZE


@cache  # asked for several times for each tile
def numpy() -> Any:
    """numpy, without the threads of its linear algebra, whose buffers are larger than ours."""
    name = "OPENBLAS_NUM_THREADS"
    if "numpy" not in sys.modules and name not in os.environ:
        os.environ[name] = "1"
        try:
            return importlib.import_module("numpy")
        finally:
            del os.environ[name]
    return importlib.import_module("numpy")


@cache
def numpy_dtype(name: str, *, values: bool) -> Any:
    """The numpy dtype of a torch dtype name. Without `values` only the width matters, and no extension is imported."""
    np = numpy()
    if not values:
        return np.dtype(f"u{ITEMSIZE[name]}")
    if name == "bool":
        return np.dtype(bool)
    if hasattr(np, name):
        return np.dtype(name)
    import ml_dtypes  # noqa: PLC0415 - only where values are converted

    return np.dtype(getattr(ml_dtypes, name))
