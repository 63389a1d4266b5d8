"""What goes wrong, said once: what / where / expected / found, and a hint with the next command."""

from __future__ import annotations


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
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint
        self.details = details  # one line per further finding of the same run, folded over layers

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
