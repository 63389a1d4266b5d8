"""docs/errors.md: every error that the tests of bad input have seen, next to the input that causes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commands import Result

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
SECTIONS = {
    "test_errors_requests": "Requests",
    "test_errors_layouts": "Parallel layouts and options",
    "test_errors_environment": "The target, the disk, other processes",
    "test_errors_huggingface": "Hugging Face directories",
    "test_errors_megatron": "Megatron checkpoints",
    "test_errors_translate": "Translation",
    "test_errors_verify": "Verification and manifests",
    "test_errors_ranks": "Runs of several processes",
    "test_hostile_files": "Broken and hostile files",
    "test_hostile_archives": "Broken and hostile torch archives",
    "test_hostile_pickles": "Broken and hostile pickles",
    "test_hostile_ranks": "Ranks and args that do not fit each other",
    "test_hostile_dist": "Broken and hostile torch_dist checkpoints",
}
HEAD = """# Errors

Every error that shardtool gives, next to the input that causes it. The page is made by the tests of bad input:
`scripts/errors-page` writes it, and tests fail when it is stale, or when a place in the source that makes an error is
neither on it nor in their list of those that no input reaches (tests/cli/test_errors_page.py).

An error says what is wrong, where (file and tensor), what was expected and what was found, and as a `hint:` what to do
next. Exit code 1 means that the checkpoint is wrong, 2 that the request or the environment is. DST is not made in
either case, and nothing that a checkpoint holds is ever executed. `--json` gives the same as data. Of what is wrong
with the tensors everything is told at once, folded over layers.

What no error can tell: a changed bit in a weight (safetensors has no checksums, and those of torch's archives are looked
at for the pickle alone, since a conversion reads the weights piece by piece), and a shard or `.distcp` file of another
save of the same model. `shardtool verify --checksums` tells both for what shardtool has written, `diff` where there is
another copy.

`SRC` is the broken checkpoint, `DST` the directory that was to be made, `MODEL` a good one.
"""
# a case that begins, or follows a name that ends, like this goes on in the same sentence; others come after a colon
BEFORE = ("with", "have", "that", "of", "is", "are", "in", "be", "version", "args", "exchanged", "another")
AFTER = ("with", "without", "that", "of", "in", "at", "before", "makes", "falls", "fails")
# what the names of tests cannot spell
SPELT = {
    "torch dist": "torch_dist", "megatron core": "megatron-core", "hugging face": "Hugging Face", "mxfp4": "MXFP4",
    "fp8": "FP8", "ctrl c": "Ctrl-C", "pytorch model bin": "pytorch_model.bin", "common pt": "common.pt", "hf": "--hf",
    "torch 1 6": "torch 1.6", "metadata": ".metadata", "dst": "DST", "src": "SRC", "distcp": ".distcp",
    "max shard size": "--max-shard-size",
}  # fmt: skip

_seen: dict[str, dict[str, list[tuple[str, Result]]]] = {}


def record(node: pytest.Item, result: Result, said: str, tmp_path: Path) -> None:
    """Keep an error; of a test with several commands those whose text differs."""
    module = Path(str(node.path)).stem
    text = _plain(said.strip(), tmp_path)
    shown = _seen.setdefault(module, {}).setdefault(heading(node), [])
    if text not in (_text for _text, _ in shown):
        shown.append((text, Result(_plain(result.command, tmp_path), result.code, "", "")))


def heading(node: pytest.Item) -> str:
    """The input as a sentence: the name of the test, then its `case` where it has several.

    Other parameters would put names of theirs into the page, so there may be none.
    """
    words = getattr(node, "originalname", node.name).removeprefix("test_").replace("_", " ")
    call = getattr(node, "callspec", None)
    for plain, spelt in SPELT.items():
        words = re.sub(rf"\b{plain}\b", spelt, words)
    if call is not None:
        assert set(call.params) == {"case"}, f"{node.name}: the cases of the page have one parameter, `case`"
        case = str(call.params["case"]) or "nothing"
        joined = words.split()[-1] in BEFORE or case.split()[0] in AFTER
        words += (" " if joined else ": ") + case
    return words[0].upper() + words[1:] if words[0] != "-" else words


def _plain(text: str, tmp_path: Path) -> str:
    text = text.replace(str(tmp_path / "source"), "SRC").replace(str(tmp_path / "dst"), "DST")
    text = text.replace(str(tmp_path), "WORK")
    text = re.sub(r"/dev/shm/\w+", "SHM", text)
    text = re.sub(r"/\S*?/(tiny|megatron)\d+/([\w-]+)", "MODEL", text)
    text = re.sub(r"last changed at [\d.]+", "last changed at TIME", text)
    text = re.sub(r"process \d+ on \S+", "process PID on HOST", text)
    text = re.sub(r"/\S*/shardtool-\d+", "TMPDIR/shardtool-UID", text)
    text = re.sub(r"\w{16}\.sock", "JOB.sock", text)
    text = re.sub(r"user \d+", "user UID", text)
    text = re.sub(r"\d+ bytes free", "N bytes free", text)
    text = re.sub(r"(127\.0\.0\.1[:, ]+)\d+", r"\1PORT", text)
    text = re.sub(
        r"found: .*(recv|sendBytes|reset by peer|Broken pipe|ended the connection).*",
        "found: what the connection to the store says",
        text,
    )
    return re.sub(r"/\S*?/(tests|src)/", r"\1/", text).replace(" -q", "")


def render() -> str:
    """The page."""
    lines = [HEAD]
    for module, title in SECTIONS.items():
        lines.append(f"\n## {title}\n")
        for name, errors in sorted(_seen[module].items()):
            lines.append(f"\n### {name}\n")
            for text, result in errors:
                lines.append(f"    $ {result.command}\n" + "\n".join("    " + line for line in text.splitlines()))
                lines.append(f"    (exit {result.code})\n")
    return "\n".join(lines).rstrip() + "\n"
