"""What the oracle tests measure, collected for docs/families.md: `scripts/families-page --measure` asks for it.

With SHARDTOOL_RESULTS set to a file, every `shardtool verify HF MEGATRON` that a test runs counts for the family that the
Megatron checkpoint came from: a ratio where the logits agree, a rejected fault where they do not. A test with another
oracle says so itself: record_property("family", ...), ("oracle", what the other side is), ("ratio", ...).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = os.environ.get("SHARDTOOL_RESULTS")
PACKAGES = ("megatron-core", "transformers", "torch")

_measured: dict[str, dict[str, Any]] = {}


def _entry(family: str) -> dict[str, Any]:
    return _measured.setdefault(family, {"logits": {}, "rejected": 0, "features": [], "layouts": []})


def of_verify(given: list[str], code: int, out: str) -> None:
    """Count one run of `shardtool verify`, given its arguments, exit code and stdout."""
    if FILE is None or given[:1] != ["verify"] or len(given) < 3:
        return
    reference, checkpoint = Path(given[1]), Path(given[2])
    if not (reference / "config.json").is_file() or (checkpoint / "config.json").is_file():
        return
    from shardtool.checkpoint.megatron import read_megatron
    from shardtool.errors import ShardtoolError
    from shardtool.families.features import features

    try:
        opened = read_megatron(checkpoint)
    except ShardtoolError:
        return
    family = str(opened.args.get("hf_model_type") or "")
    levels = json.loads(out)["levels"] if "--json" in given and out else []
    logits = next((level for level in levels if level["level"] == "logits"), None)
    if not family:
        return
    if code == 1 and (logits is None or not logits["problems"]):
        _entry(family)["rejected"] += 1
    elif code == 0 and logits is not None and "--dtype" not in given:
        entry, mesh = _entry(family), opened.mesh
        against = f"transformers {json.loads((reference / 'config.json').read_text())['model_type']}"
        entry["logits"][against] = max(entry["logits"].get(against, 0.0), float(logits["ratio"]))
        sizes = {"tp": mesh.tp, "pp": mesh.pp, "vpp": mesh.vpp, "ep": mesh.ep, "etp": mesh.etp or mesh.tp}
        shown = [f"{name} {size}" for name, size in sizes.items() if size > 1 and (name != "etp" or size != mesh.tp)]
        entry["layouts"].append(" ".join([opened.format, *shown]))
        entry["features"] += features(opened.architecture)


def of_properties(properties: Iterable[tuple[str, object]]) -> None:
    """Count a test that names its own oracle."""
    said = dict(properties)
    if FILE is not None and "family" in said and "oracle" in said:
        held, oracle = _entry(str(said["family"]))["logits"], str(said["oracle"])
        held[oracle] = max(held.get(oracle, 0.0), float(str(said.get("ratio", 0.0))))


def write() -> None:
    """Put what this run measured in the file, beside the families that it did not measure."""
    if FILE is None or not _measured:
        return
    path = Path(FILE)
    known: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    families = dict(known.get("families", {}))
    for family, entry in _measured.items():
        if entry["logits"]:
            families[family] = {
                "logits": {name: float(f"{ratio:.1e}") for name, ratio in sorted(entry["logits"].items())},
                "rejected": entry["rejected"],
                "layouts": len(set(entry["layouts"])),
                "features": sorted(set(entry["features"])),
            }
    content = {
        "versions": {name: version(name) for name in PACKAGES},
        "families": dict(sorted(families.items())),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
