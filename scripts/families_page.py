"""docs/families.md: what each family has, what has been measured of it, what is refused. Run by scripts/families-page.

Nothing of the page is written by hand: families come from the registry, what they have from their configs, refusals from
the cases of tests/families with the reason that the code gives, results from docs/families-measured.json.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, MEASURED = ROOT / "docs" / "families.md", ROOT / "docs" / "families-measured.json"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "families")]

from shardtool.errors import UsageError  # noqa: E402 - beside the tests' folders
from shardtool.families.features import features  # noqa: E402
from shardtool.families.megatron_args import NOT_CONVERTED  # noqa: E402
from shardtool.families.registry import FAMILIES, family_of  # noqa: E402

CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "configs" / "tiny").glob("*.json"))}

HEAD = """# Model families

<!-- made by scripts/families-page; do not edit -->

Every family below converts in all three directions (`hf2megatron`, `megatron2hf`, `reshard`), in both Megatron formats and
in every parallel layout that its sizes allow. A round trip is bit-identical.

*Logits* is the proof: the converted checkpoint, loaded by the real megatron-core, against the other side named there, on
models with random weights in fp32. The figure is the largest difference of a logit, divided by the standard deviation of
all logits, over every layout that was run; `verify` fails above 1e-4. Where the family's code is not in transformers, the
same weights run as a twin that is. *Faults rejected* counts planted faults (a row order, a scale, a flag) that the same
check had to find, and found.
"""


def table(measured: dict[str, Any]) -> Iterator[str]:
    """One row per family."""
    yield "| family | class | has | logits | layouts | faults rejected |"
    yield "|---|---|---|---|---|---|"
    for name, family in FAMILIES.items():
        if family.not_in_megatron({}):
            continue
        entry = measured.get(name, {})
        logits = "<br>".join(f"{ratio:.1e} against {against}" for against, ratio in entry.get("logits", {}).items())
        cells = [
            f"`{name}`", f"`{family.architecture}`", ", ".join(parts(name, entry)), logits or "not measured",
            str(entry.get("layouts") or ""), str(entry.get("rejected") or ""),
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def parts(name: str, entry: dict[str, Any]) -> list[str]:
    """What the models of a family have: those that were measured, and those of configs/tiny."""
    found = dict.fromkeys(part for a in architectures(name) for part in features(a))
    return list(found | dict.fromkeys(part for part in entry.get("features", ())))


def architectures(name: str) -> list[Any]:
    """The architectures of configs/tiny that are of a family."""
    configs = [config for config in CONFIGS.values() if config["model_type"] == name]
    return [FAMILIES[name].read_config(config) for config in configs]


def caveats() -> Iterator[str]:
    """Where Megatron cannot compute exactly the same; of models as they are published and of configs/tiny."""
    for name, family in FAMILIES.items():
        if family.not_in_megatron({}):
            continue
        for text in dict.fromkeys(text for a in architectures(name) for text in family.caveats(a)):
            yield f"- `{name}`: {text}"


def refusal_cases() -> Iterator[tuple[ModuleType, str, dict[str, Any]]]:
    """The (name of a tiny config, changes) of every test that a changed config is refused."""
    for path in sorted((ROOT / "tests" / "families").glob("test_*.py")):
        module = importlib.import_module(path.stem)
        for test in vars(module).values():
            for mark in getattr(test, "pytestmark", []):
                if mark.name == "parametrize" and list(mark.args[0])[:2] == ["name", "changes"]:
                    for case in mark.args[1]:
                        values = getattr(case, "values", case)
                        if values[0] in CONFIGS and isinstance(values[1], dict):
                            yield module, values[0], values[1]


def refusals() -> Iterator[str]:
    """Per family the reasons, as the code words them, with the keys that they come from."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module, name, changes in refusal_cases():
        make = getattr(module, "config_of", None)
        config = make(name, **changes) if make else CONFIGS[name] | changes
        try:
            family_of(config).read_config(config)
        except UsageError as error:
            reason = error.what.partition("cannot be converted: ")[2] or error.what
            found[config["model_type"]][reason] |= changes.keys()
    for family in sorted(found, key=list(FAMILIES).index):
        yield f"\n**`{family}`**\n"
        for reason, keys in found[family].items():
            yield f"- {reason} ({', '.join(f'`{key}`' for key in sorted(keys))})"


def unknown() -> Iterator[str]:
    """Model types that are known and not converted."""
    try:
        refused = importlib.import_module("shardtool.families.refused").REFUSED
    except ModuleNotFoundError:
        return
    yield "\n## Model types that are not converted\n"
    yield from (f"- `{name}`: {reason}" for name, reason in refused.items())
    reasons = {name: family.not_in_megatron({}) for name, family in FAMILIES.items()}
    yield from (f"- `{name}`: {reason}; `translate` reads it" for name, reason in reasons.items() if reason)


def page() -> str:
    """The whole page."""
    content = json.loads(MEASURED.read_text())
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [HEAD, *table(content["families"]), f"\nMeasured with {versions}."]
    if held := list(caveats()):
        lines += ["\n## Not exactly the same\n", *held]
    lines += [
        "\n## What is refused\n",
        "A model that megatron-core cannot express is refused before anything is written. The reasons, as a test exercises"
        " each of them, and the keys of config.json that they come from:",
        *refusals(), *unknown(),
        "\n## Megatron checkpoints that are not converted\n",
        "By an entry of their args:\n",
        *(f"- `{name}`: {what}" for name, what in NOT_CONVERTED.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    made = page()
    if "--check" in arguments:
        if PAGE.is_file() and PAGE.read_text() == made:
            return 0
        sys.stderr.write("docs/families.md is not what scripts/families-page writes: run it\n")
        return 1
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
