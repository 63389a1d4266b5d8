"""FP8 directories for transformers on a CPU: a temporary copy with the values that the blocks and scales stand for.

transformers 5.23 dequantises only tensors that its blocks divide evenly (integrations/finegrained_fp8.py). This is plain
torch, and shares nothing with what the conversion does (execute.codecs).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shardtool.errors import CheckpointError

SCALE = "_scale_inv"


@contextmanager
def loadable(directory: Path) -> Iterator[Path]:
    """The directory itself, or for FP8 a dequantised copy (fp32) that is there until the block ends.

    CheckpointError where config.json does not say how the weights are scaled, or scales do not fit.
    """
    config = json.loads((directory / "config.json").read_text()) if (directory / "config.json").is_file() else {}
    form = config.get("quantization_config") or {}
    if form.get("quant_method") != "fp8":
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="shardtool-verify-") as scratch:
        copy = Path(scratch)
        _write(directory, copy, form)
        kept = {name: value for name, value in config.items() if name != "quantization_config"}
        (copy / "config.json").write_text(json.dumps(kept | {"dtype": "float32"}))
        yield copy


def _write(directory: Path, copy: Path, form: dict[str, Any]) -> None:
    from safetensors import safe_open  # noqa: PLC0415 - for FP8 directories only
    from safetensors.torch import save_file  # noqa: PLC0415

    opened: list[Any] = [safe_open(file, framework="pt") for file in sorted(directory.glob("*.safetensors"))]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a mapping
    weight_map: dict[str, str] = {}
    for number, file in enumerate(opened):
        held = {}
        for name in file.keys():  # noqa: SIM118 - as above
            value = file.get_tensor(name)
            if value.dtype == torch.float8_e4m3fn:
                scale = where[name + SCALE].get_tensor(name + SCALE) if name + SCALE in where else None
                held[name] = _values(name, value, scale, form, directory)
            elif not name.endswith(SCALE):
                held[name] = value
        shard = f"model-{number:05d}.safetensors"
        save_file(held, copy / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(held, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))


def _values(
    name: str, matrix: torch.Tensor, scale: torch.Tensor | None, form: dict[str, Any], directory: Path
) -> torch.Tensor:
    rows, columns = form.get("weight_block_size") or (0, 0)
    grid = (-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns)) if rows and columns else ()
    if scale is None or tuple(scale.shape) != grid:
        raise CheckpointError(
            "an FP8 tensor cannot be dequantised", where=f"{directory}: {name}", expected=f"scales {list(grid)}",
            found="none" if scale is None else str(list(scale.shape)),
            hint="copy the files again: the scales are tensors of their own",
        )  # fmt: skip
    row = torch.arange(matrix.shape[0])[:, None] // rows
    column = torch.arange(matrix.shape[1])[None] // columns
    return matrix.float() * scale.float()[row, column]
