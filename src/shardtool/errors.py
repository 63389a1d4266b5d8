"""What goes wrong, said once: what / where / expected / found, and a hint with the next command."""

from __future__ import annotations

from typing import overload

LONGEST = 2000  # characters of one part of an error


@overload
def _shown(text: str) -> str: ...
@overload
def _shown(text: None) -> None: ...
def _shown(text: str | None) -> str | None:
    """A part of an error as it may be printed: one line, without control characters, not endless.

    Names come from files that others have made: a tensor's name could hold line breaks or move the terminal's cursor.
    """
    if text is None:
        return None
    text = str(text)  # a value of a file where a word belongs
    if text.isprintable() and len(text) <= LONGEST:
        return text
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class ShardtoolError(Exception):
    """An error that a user can act on.

    `what` is one sentence; `where` names the file and the tensor; `expected` and `found` are short;
    `hint` is the next command or the next thing to try.
    """

    exit_code = 1
    kind = "error"

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
        details: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what)
        self.what = _shown(what)
        self.where = _shown(where)
        self.expected = _shown(expected)
        self.found = _shown(found)
        self.hint = _shown(hint)
        self.details = tuple(map(_shown, details))  # one line per further finding of the same run, folded over layers

    def as_dict(self) -> dict[str, object]:
        """The error as plain data, for `--json`."""
        fields = ("what", "where", "expected", "found", "hint")
        data: dict[str, object] = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        if self.details:
            data["details"] = list(self.details)
        return {"error": self.kind, **data}

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {name}: {getattr(self, name)}" for name in ("where", "expected", "found") if getattr(self, name)]
        lines += [f"  - {line}" for line in self.details]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class CheckpointError(ShardtoolError):
    """The checkpoint is wrong: broken, incomplete, or not what it says. Exit code 1."""

    exit_code = 1
    kind = "checkpoint"


class UsageError(ShardtoolError):
    """The request or the environment is wrong: the checkpoint may be fine. Exit code 2."""

    exit_code = 2
    kind = "usage"


class Interrupted(ShardtoolError):  # noqa: N818 - what the user has done is no error
    """Ctrl-C. Exit code 130, as of a shell's command that SIGINT ended."""

    exit_code = 130
    kind = "interrupted"
