"""Tokenizers and models that are code of their repository: the files come along, and nothing of them is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import command, convert, done

TinyModel = Callable[[str], Path]

TOKENIZER = """
from transformers import PreTrainedTokenizer

from .{helper} import pieces

VOCAB_FILES_NAMES = {{"vocab_file": "acorn.tiktoken", "other_file": "../outside.model"}}

class AcornTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "acorn.tiktoken"}}

    def __init__(self, vocab_file, **more):
        self.words = dict((line, number) for number, line in enumerate(open(vocab_file).read().split()))
        super().__init__(**more)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text):
        return pieces(text)

    def _convert_token_to_id(self, token):
        return self.words[token]

    def _convert_id_to_token(self, index):
        return {{number: word for word, number in self.words.items()}}[index]
"""


def with_code(model: Path, out: Path, ran: Path) -> Path:
    """A copy of a model whose tokenizer is code, which leaves a file behind where it is run."""
    shutil.copytree(model, out)
    (out / "tokenization_acorn.py").write_text(TOKENIZER.format(helper="acorn_pieces"))
    (out / "acorn_pieces.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\ndef pieces(text):\n    return text.split()\n"
    )
    (out / "modeling_acorn.py").write_text("raise SystemExit('run')\n")
    (out / "unused.py").write_text("")
    (out / "acorn.tiktoken").write_text("an acorn is a nut")
    mapped = {"AutoTokenizer": ["tokenization_acorn.AcornTokenizer", None]}
    (out / "tokenizer_config.json").write_text(json.dumps({"auto_map": mapped, "tokenizer_class": "AcornTokenizer"}))
    return out


def test_a_tokenizer_that_is_code(tiny_model: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ran = tmp_path / "ran"
    source = with_code(tiny_model("llama"), tmp_path / "in", ran)
    result = done("translate", source, tmp_path / "out", "--to", "qwen2", "-q", "--json").json
    assert not ran.exists()
    assert (
        "code of the source's repository, copied and not run: tokenization_acorn.py, acorn_pieces.py" in result["notes"]
    )
    for name in ("tokenization_acorn.py", "acorn_pieces.py", "acorn.tiktoken", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    for name in ("unused.py", "modeling_acorn.py"):
        assert not (tmp_path / "out" / name).exists()
    listed = json.loads((tmp_path / "out" / "shardtool.json").read_text())["files"]
    assert {"tokenization_acorn.py", "acorn_pieces.py", "acorn.tiktoken"} <= set(listed)
    # the oracle: transformers finds all that it needs beside the config
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert ran.exists()
    assert tokens("a nut is an acorn")["input_ids"] == [3, 4, 2, 0, 1]


def test_the_code_of_a_model_comes_with_its_config(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = with_code(tiny_model("llama"), tmp_path / "in", tmp_path / "ran")
    config = json.loads((source / "config.json").read_text())
    mapped = {"AutoModelForCausalLM": "modeling_acorn.AcornForCausalLM"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": mapped}))
    megatron = convert(source, tmp_path / "megatron")
    done("megatron2hf", megatron, tmp_path / "out", "--hf", source, "-q")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == mapped
    assert (tmp_path / "out" / "modeling_acorn.py").exists()
    assert (tmp_path / "out" / "tokenization_acorn.py").exists()
    done("translate", source, tmp_path / "other", "--to", "qwen2", "-q")
    assert not (tmp_path / "other" / "modeling_acorn.py").exists()  # its config.json names no code
    assert not (tmp_path / "ran").exists()


def mapping(source: Path, value: object) -> None:
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": value}}))


@pytest.mark.parametrize(
    ("value", "note"),
    [
        (["acorn/nuts--tokenization_acorn.AcornTokenizer", None], "is code of another repository"),
        (
            ["tokenization_gone.AcornTokenizer", None],
            "tokenization_gone.py is named as code of the source's repository",
        ),
    ],
)
def test_code_that_is_not_there_is_said(value: object, note: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = with_code(tiny_model("llama"), tmp_path / "in", tmp_path / "ran")
    mapping(source, value)
    result = done("translate", source, tmp_path / "out", "--to", "qwen2", "-q", "--json").json
    assert any(note in line for line in result["notes"])
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(
    ("value", "message"),
    [("../outside.Tokenizer", "names no module beside it"), (7, "auto_map cannot be read")],
)
def test_code_elsewhere_is_refused(value: object, message: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = with_code(tiny_model("llama"), tmp_path / "in", tmp_path / "ran")
    mapping(source, value)
    result = command("translate", source, tmp_path / "out", "--to", "qwen2", "-q")
    assert result.code == 1
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_directory_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = with_code(tiny_model("llama"), tmp_path / "in", tmp_path / "ran")
    (tmp_path / "secret.py").write_text("a secret")
    (source / "acorn_pieces.py").unlink()
    (source / "acorn_pieces.py").symlink_to(tmp_path / "secret.py")
    result = command("translate", source, tmp_path / "out", "--to", "qwen2", "-q")
    assert result.code == 1
    assert "a link leads out of the checkpoint" in result.err
    assert not (tmp_path / "out").exists()
