"""Where in the source an error is made, and which of these places a test has seen a user get an error from.

A place is a call of an error class, of a function that makes or raises one, or a `raise ValueError` of a reader, which
becomes the `found` of an error. A place is seen when its line is on the stack, or in the traceback that is being
handled, while an error is made that the command then prints.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import shardtool
from shardtool.errors import ShardtoolError

ROOT = Path(shardtool.__file__).parent
CLASSES = (
    "CheckpointError",
    "UsageError",
    "ShardtoolError",
    "DiffersError",
    "UntranslatableError",
    "RankError",
    "Interrupted",
)
# Their errors go by their text: verify's workers are processes of their own, whose stacks nobody sees, and a
# translation's reasons are collected before one error is made of them
BY_TEXT = ("verify/", "translate/")
LEAST = 8  # characters of a text that are its own

Line = tuple[str, int]


@dataclass(frozen=True, order=True)
class Site:
    """One place that makes an error: `path:function`, lines, and its text as a pattern where it is written there."""

    function: str
    first: int
    last: int
    text: str  # as in the source, for people
    pattern: str | None
    reason: bool = False  # a ValueError, whose text becomes a part of an error

    @property
    def path(self) -> str:
        return self.function.partition(":")[0]

    @property
    def name(self) -> str:
        return f"{self.function}: {self.text}"

    def seen(self, lines: set[Line], texts: list[str]) -> bool:
        """Whether an error of this place was printed."""
        if any((self.path, line) in lines for line in range(self.first, self.last + 1)):
            return True
        by_text = self.reason or self.path.startswith(BY_TEXT)
        pattern = self.pattern if by_text and self.pattern is not None else None
        return pattern is not None and any(re.search(pattern, text) for text in texts)


class _Places(ast.NodeVisitor):
    """The places of one module; `makers` are the functions that make or raise errors, by name."""

    def __init__(self, path: str, makers: frozenset[str]) -> None:
        self.path, self.makers = path, makers
        self.inside: list[str] = []
        self.found: list[Site] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in self.makers:
            self._add(node, node)
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        call = node.exc
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in ("ValueError", "TypeError")
        ):
            self._add(node, call, reason=True)
        self.generic_visit(node)

    def _add(self, node: ast.Call | ast.Raise, call: ast.Call, *, reason: bool = False) -> None:
        texts = [argument for argument in call.args if isinstance(argument, ast.Constant | ast.JoinedStr)]
        text = ast.unparse(texts[0])[:100] if texts else "(a text of its caller)"
        function = f"{self.path}:{'.'.join(self.inside)}"
        pattern = _pattern(texts[0]) if texts else None
        self.found.append(
            Site(
                function,
                node.lineno,
                node.end_lineno or node.lineno,
                text.removeprefix("f").strip("'\""),
                pattern,
                reason,
            )
        )


def _pattern(text: ast.expr) -> str | None:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    fixed = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
    if sum(map(len, filter(None, fixed))) < LEAST:
        return None
    return "".join(".*" if part is None else re.escape(part) for part in fixed)


@cache
def sites() -> tuple[Site, ...]:
    """Every place in the source that makes an error."""
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
    made = {
        path: {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _makes_errors(node)}
        for path, tree in trees.items()
    }
    shared = {name for names in made.values() for name in names if not name.startswith("_")}
    found: list[Site] = []
    for path, tree in trees.items():
        visitor = _Places(path, frozenset(made[path] | shared) | frozenset(CLASSES))
        visitor.visit(tree)
        found += visitor.found
    return tuple(found)


def _makes_errors(function: ast.FunctionDef) -> bool:
    """A function whose result is an error, or that never returns."""
    if function.returns is None:
        return False
    return ast.unparse(function.returns) in ("NoReturn", *CLASSES)


_lines: set[Line] = set()
_texts: list[str] = []


@contextmanager
def watched() -> Iterator[list[tuple[ShardtoolError, set[Line]]]]:
    """Within it, every error that is made is kept with the lines that made it."""
    made: list[tuple[ShardtoolError, set[Line]]] = []
    original = ShardtoolError.__init__

    def init(self: ShardtoolError, *arguments: Any, **parts: Any) -> None:
        original(self, *arguments, **parts)
        handled = sys.exc_info()[1]
        lines = set(_stack(sys._getframe(1))) | (set(_traceback(handled.__traceback__)) if handled else set())
        made.append((self, lines))

    ShardtoolError.__init__ = init  # type: ignore[method-assign]
    try:
        yield made
    finally:
        ShardtoolError.__init__ = original  # type: ignore[method-assign]


def note(made: list[tuple[ShardtoolError, set[Line]]], printed: str) -> None:
    """Keep the places of those errors that were printed."""
    for error, lines in made:
        if error.what in printed:
            _lines.update(lines)
    _texts.append(printed)


def unseen() -> list[Site]:
    """Places whose error no test has seen printed."""
    return [site for site in sites() if not site.seen(_lines, _texts)]


def _stack(frame: FrameType | None) -> Iterator[Line]:
    while frame is not None:
        yield from _line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back


def _traceback(entry: TracebackType | None) -> Iterator[Line]:
    while entry is not None:
        yield from _line(entry.tb_frame.f_code.co_filename, entry.tb_lineno)
        entry = entry.tb_next


def _line(file: str, number: int) -> Iterator[Line]:
    if file.startswith(str(ROOT)):
        yield str(Path(file).relative_to(ROOT)), number
