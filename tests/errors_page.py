"""docs/errors.md: every error that the tests of bad input have seen, next to the input that causes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commands import Result

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
MODULES = ("test_errors", "test_hostile")
HEAD = """# Errors

Every error that shardtool gives, next to the input that causes it. The page is made by the tests of bad input:
`scripts/errors-page` writes it, and a test fails when it is stale.

An error says what is wrong, where (file and tensor), what was expected and what was found, and often as a `hint:` what
to do next. Exit code 1 means that the checkpoint is wrong, 2 that the request or the environment is. Nothing is written
in either case, and nothing that a checkpoint holds is ever executed. `--json` gives the same as data. Of what is wrong
with the tensors everything is told at once, folded over layers.

What no error can tell: a changed bit in a weight of a safetensors file (there is no checksum in it; compare with
`shardtool verify --checksums` or `diff`), and two `.distcp` files of the same size that were exchanged.

`SRC` is the broken checkpoint, `DST` the directory that was to be made, `MODEL` a good one.
"""

_seen: dict[str, list[tuple[str, Result]]] = {}


def record(node: pytest.Item, result: Result, tmp_path: Path) -> None:
    """Keep an error; of a test with several commands those whose text differs."""
    module = Path(str(node.path)).stem
    if module not in MODULES:
        return
    text = _plain(result.err.strip(), tmp_path)
    shown = _seen.setdefault(f"{module}::{node.name}", [])
    if text not in (_text for _text, _ in shown):
        shown.append((text, Result(_plain(result.command, tmp_path), result.code, "", "")))


def _plain(text: str, tmp_path: Path) -> str:
    text = text.replace(str(tmp_path / "source"), "SRC").replace(str(tmp_path / "dst"), "DST")
    text = text.replace(str(tmp_path), "WORK")
    text = re.sub(r"/\S*?/(tiny|megatron)\d+/([\w-]+)", "MODEL", text)
    return re.sub(r"/\S*?/tests/", "tests/", text).replace(" -q", "")


def render() -> str:
    """The page."""
    lines = [HEAD]
    for module, title in zip(MODULES, ("Requests and checkpoints", "Broken and hostile files"), strict=True):
        lines.append(f"\n## {title}\n")
        for name in sorted(key for key in _seen if key.startswith(module + "::")):
            test = name.partition("::")[2].removeprefix("test_")
            words, _, case = test.partition("[")
            lines.append(f"\n### {words.replace('_', ' ')}{': ' + case.rstrip(']') if case else ''}\n")
            for text, result in _seen[name]:
                lines.append(f"    $ {result.command}\n" + "\n".join("    " + line for line in text.splitlines()))
                lines.append(f"    (exit {result.code})\n")
    return "\n".join(lines).rstrip() + "\n"


def count() -> int:
    """Tests whose errors were seen."""
    return len(_seen)
