"""Runs commands in this process, so that the worker processes of `verify` are shared by all tests."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from shardtool.cli.main import run


@dataclass(frozen=True)
class Result:
    """What a command left behind: exit code, stdout, stderr."""

    command: str
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as JSON."""
        return json.loads(self.out)


def command(*arguments: object) -> Result:
    """`shardtool ARGUMENTS`, whatever comes of it."""
    given = [str(item) for item in arguments]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(given)
        except SystemExit as stop:
            code = int(stop.code or 0)
    results.of_verify(given, code, out.getvalue())
    return Result("shardtool " + " ".join(given), code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Result:
    """`shardtool ARGUMENTS`, which must exit 0."""
    result = command(*arguments)
    assert result.code == 0, f"{result.command}\n{result.out}\n{result.err}"
    return result


def convert(model: Path, out: Path, *options: object) -> Path:
    """`shardtool hf2megatron MODEL OUT OPTIONS`; returns OUT."""
    done("hf2megatron", model, out, "-q", *options)
    return out
