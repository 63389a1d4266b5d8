"""Every console block of the README and of docs/ is run, in order, and prints what it shows.

`...` stands for any text; measured figures (seconds, rates, float rounding) are not compared.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = [
    (re.compile(r"in \d+\.\d s \([^)]*/s\), peak memory \d+\.\d [kMG]B"), "in # s"),
    (re.compile(r"\d+\.\d\de[+-]\d\d"), "#"),
    (re.compile(r"at prompt \d+ position \d+ token \d+"), "at #"),
    (re.compile(r"[0-9a-f]{64}"), "#"),
]


def blocks(path: Path) -> list[list[tuple[str, str]]]:
    """The console blocks of a file: (command, output) pairs each."""
    found = []
    for text in re.findall(r"^```console\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
        parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
        found.append([(part.partition("\n")[0], part.partition("\n")[2]) for part in parts])
    return found


def normal(text: str) -> str:
    for pattern, mark in MEASURED:
        text = pattern.sub(mark, text)
    return text.strip()


def shown(expected: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in normal(expected).split("...")), re.DOTALL)


def run_command(command: str) -> str:
    from shardtool.cli.main import run

    words = shlex.split(command)
    assert words[0] == "shardtool", f"not a shardtool command: {command}"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        run(words[1:])
    return out.getvalue() + (err.getvalue() if stop.value.code else "")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_console_blocks(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    commands = [pair for block in blocks(path) for pair in block]
    if not commands:
        return
    (tmp_path / "model").symlink_to(request.getfixturevalue("tiny_model")("llama"))
    if any("SmolLM2" in command for command, _ in commands):
        (tmp_path / "SmolLM2-135M-Instruct").symlink_to(request.getfixturevalue("smollm2_dir"))
    monkeypatch.chdir(tmp_path)
    for command, expected in commands:
        printed = run_command(command)
        assert shown(expected).fullmatch(normal(printed)), f"$ {command}\n{printed}"


def test_the_readme_shows_a_command_first() -> None:
    assert blocks(ROOT / "README.md")[0][0][0].startswith("shardtool ")
