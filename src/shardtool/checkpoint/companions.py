"""What travels with the weights of a Hugging Face directory: tokenizer, chat template, generation settings.

Some tokenizers (and models) are code of their repository: `auto_map` in tokenizer_config.json or config.json names the
module. Its files are copied as text, never run; whoever loads the result decides with `trust_remote_code`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from shardtool.errors import CheckpointError
from shardtool.formats.hf_index import plain_file, strict_json
from shardtool.formats.small_files import CONFIG_BYTES, read_small

TOKENIZER_CONFIG = "tokenizer_config.json"
COMPANIONS = (
    "generation_config.json", "tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "tokenizer.jsonl", "preprocessor_config.json",
)  # fmt: skip
MODULE = re.compile(r"(\w+)\.\w+")  # auto_map's "module.Class"
# as transformers finds them (dynamic_module_utils.py get_relative_imports)
IMPORTS = re.compile(r"^[ \t]*(?:from[ \t]+\.(\w+)[ \t]+import|import[ \t]+\.(\w+))", re.MULTILINE)
VOCABULARIES = re.compile(r"^VOCAB_FILES_NAMES\b[^={]*=\s*\{([^{}]*)\}", re.MULTILINE)
VOCABULARY = re.compile(r""":\s*["']([\w.-]+\.(?:tiktoken|model|txt|bpe|vocab))["']""")
MOST = 64  # modules of one repository


class Companions(Struct, frozen=True):
    """Files by name with their contents; `code` are those that are Python code, `notes` what is to be said."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def companions(source: Path, config: bytes = b"{}") -> Companions:
    """Tokenizer, chat template and generation config of a directory, as far as they are there, and the code that they or the
    `config` (a config.json to be written beside them) name.

    CheckpointError where a file is a link out of the directory: a copy of it would travel with the model.
    """
    there = [name for name in COMPANIONS if (source / name).is_file()]
    files = {name: plain_file(source, name, str(source)).read_bytes() for name in there}
    named = [(name, source / "config.json") for name in _named(json.loads(config), str(source / "config.json"))]
    if TOKENIZER_CONFIG in files:
        where = source / TOKENIZER_CONFIG
        named += [
            (name, where) for name in _named(strict_json(read_small(where, CONFIG_BYTES), str(where)), str(where))
        ]
    code, notes = _code(source, named)
    vocabularies = {name for data in code.values() for name in _vocabularies(data) if name not in files}
    for name in sorted(vocabularies):
        if (source / name).is_file():
            files[name] = plain_file(source, name, str(source)).read_bytes()
    if code:
        notes.append(f"code of the source's repository, copied and not run: {', '.join(code)}")
    return Companions({**files, **code}, tuple(code), tuple(notes))


def _named(config: Mapping[str, Any], where: str) -> Iterator[str]:
    """What the auto_map of a config names: "module.Class", or that of another repository behind "--"."""
    mapped = config.get("auto_map") or {}
    values = list(mapped.values()) if isinstance(mapped, dict) else mapped
    for value in values if isinstance(values, list) else [values]:
        for one in value if isinstance(value, list) else [value]:  # a tokenizer has a slow and a fast class
            if one is not None and not isinstance(one, str):
                raise CheckpointError(
                    "auto_map cannot be read",
                    where=where,
                    expected="module.Class",
                    found=repr(one)[:80],
                    hint="mend auto_map, or take it out with the code that it names",
                )
            if one is not None:
                yield one


def _code(source: Path, named: list[tuple[str, Path]]) -> tuple[dict[str, bytes], list[str]]:
    """The modules that are named, each with the file that names it, and what they import from beside them; and notes on
    what is not there.
    """
    wanted: list[str] = []
    notes: dict[str, None] = {}
    for name, where in named:
        if "--" in name:
            notes[f"{name} is code of another repository, which the result refers to as the source does"] = None
        elif match := MODULE.fullmatch(name):
            wanted.append(match[1] + ".py")
        else:
            raise CheckpointError(
                "auto_map names no module beside it",
                where=str(where),
                expected="module.Class",
                found=repr(name)[:80],
                hint="mend auto_map, or take it out with the code that it names",
            )
    found: dict[str, bytes] = {}
    for file in wanted:  # grows while it is gone through
        if file in found or len(found) == MOST:
            continue
        if not (source / file).is_file():
            notes[f"{file} is named as code of the source's repository and is not there"] = None
            continue
        found[file] = read_small(plain_file(source, file, str(source)), CONFIG_BYTES)
        wanted += [(a or b) + ".py" for a, b in IMPORTS.findall(found[file].decode(errors="replace"))]
    return found, list(notes)


def _vocabularies(code: bytes) -> list[str]:
    """The files that a tokenizer's code has its vocabulary in, as it states them."""
    return [name for block in VOCABULARIES.findall(code.decode(errors="replace")) for name in VOCABULARY.findall(block)]
