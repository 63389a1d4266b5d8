"""What is in a directory: format, layout, layers, dtypes, bytes, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct, field, to_builtins

from shardtool.checkpoint.huggingface import open_huggingface
from shardtool.checkpoint.megatron import Megatron, read_megatron
from shardtool.checkpoint.opened import Opened
from shardtool.errors import ShardtoolError
from shardtool.families.architecture import Architecture
from shardtool.families.dialects import found_in
from shardtool.formats.detect import detect
from shardtool.layout.mesh import virtual_stages


class Inspection(Struct, frozen=True):
    """The findings: `facts` in order for people and machines, and the problem that was found, if any."""

    path: Path
    facts: dict[str, Any]
    tensors: list[dict[str, Any]] = field(default_factory=list)
    problem: ShardtoolError | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        problem = None if self.problem is None else self.problem.as_dict()
        return {"path": str(self.path), **self.facts, "tensors": self.tensors, "problem": problem}

    def lines(self, *, verbose: bool = False) -> list[str]:
        """For people; with `verbose` every tensor."""
        width = max(len(name) for name in self.facts)
        shown = [f"{name.replace('_', ' '):<{width}}  {_text(value)}" for name, value in self.facts.items()]
        if verbose:
            shown += ["", *(f"{t['dtype']:<9} {t['shape']!s:<22} {t['name']}{t['where']}" for t in self.tensors)]
        return shown


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def inspect_checkpoint(path: Path, *, values: bool = False, allow_nan: bool = False) -> Inspection:
    """Look at a checkpoint; its payload is read only for `values`. What is wrong with its tensors is the `problem`.

    Raises CheckpointError or UsageError where not even its description can be read.
    """
    found = detect(path)
    if found.kind.startswith("hf_"):
        facts: dict[str, Any] = {"format": f"Hugging Face {'safetensors' if found.kind == 'hf_safetensors' else 'bin'}"}
        source = open_huggingface(path)
        opened = source.opened
        if dialects := found_in(source.family.rules(opened.architecture), opened.layout.rules, source.family.dialects):
            facts["dialect"] = ", ".join(dialects)
        return _with_tensors(path, facts | _model(opened.architecture), opened, values, allow_nan)
    megatron = read_megatron(path)
    facts = {"format": f"Megatron {megatron.format}", **_layout(megatron)}
    try:
        opened = megatron.open()
    except ShardtoolError as error:
        return Inspection(path, facts | _model(megatron.architecture), problem=error)
    return _with_tensors(path, facts | _model(megatron.architecture), opened, values, allow_nan)


def _layout(megatron: Megatron) -> dict[str, Any]:
    save, mesh = megatron.save, megatron.mesh
    facts: dict[str, Any] = {
        "save": save.directory.name,
        "layout": {"tp": mesh.tp, "pp": mesh.pp, "vpp": virtual_stages(mesh), "ep": mesh.ep}
        | ({"etp": mesh.expert_tp} if megatron.architecture.moe else {}),
        "spec": megatron.spec,
        "padded_vocab": megatron.padded_vocab,
    }
    if megatron.chunks:
        facts["stages"] = [
            f"stage {chunk.pp}"
            + (f" chunk {chunk.vpp}" if virtual_stages(mesh) > 1 else "")
            + f": {_span(chunk.layers)}"
            for chunk in megatron.chunks
        ]
    if megatron.not_converted:
        facts["beside_the_model"] = list(megatron.not_converted)
    return facts


def _span(layers: tuple[int, ...]) -> str:
    if not layers:
        return "no layers"
    return f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"


def _model(a: Architecture) -> dict[str, Any]:
    data = to_builtins(a)
    rope = data.pop("rope")
    return {
        "family": data.pop("family") or "not named",
        "model": {name: value for name, value in data.items() if value not in (False, None)},
        "positions": "learned" if rope is None else {name: value for name, value in rope.items() if value is not None},
    }


def _with_tensors(path: Path, facts: dict[str, Any], opened: Opened, values: bool, allow_nan: bool) -> Inspection:
    facts |= {
        "tensors": len(opened.headers),
        "parameters": sum(header.nbytes // _width(header.dtype) for header in opened.headers.values()),
        "bytes": opened.nbytes,
        "dtypes": opened.dtypes(),
        "ignored": len(opened.ignored),
    }
    tensors = [
        {
            "name": key[1],
            "where": f" in {key[0]}" if key[0] else "",
            "part": list(key[2]),
            "shape": list(header.shape),
            "dtype": header.dtype,
        }
        for key, header in opened.headers.items()
    ]
    count = facts.pop("tensors")
    facts |= {"tensor_count": count}
    if not values:
        return Inspection(path, facts, tensors)
    from shardtool.execute import finite  # noqa: PLC0415 - numpy, only where values are looked at

    found = finite.scan(opened.headers, opened.locate)
    facts |= {"not_finite": [str(item) for item in found]}
    try:
        finite.refuse([] if allow_nan else found, str(path), opened.locate)
    except ShardtoolError as error:
        return Inspection(path, facts, tensors, error)
    return Inspection(path, facts, tensors)


def _width(dtype: str) -> int:
    from shardtool.formats.stored import ITEMSIZE  # noqa: PLC0415

    return ITEMSIZE[dtype]
