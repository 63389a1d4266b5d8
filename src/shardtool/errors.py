"""What goes wrong, said once: what / where / expected / found, and a hint with the next command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import overload

LONGEST = 2000  # characters of one part of an error
GET_AGAIN = "download or copy the file again, and compare its size or checksum with the original"

BUG = "this is a bug in shardtool: report it with the output of `shardtool --debug ...`"


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
        hint: str,
        details: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what)
        self.what = _shown(what)
        self.where = _shown(where)
        self.expected = _shown(expected)
        self.found = _shown(found)
        self.hint = _shown(hint)
        self.details = tuple(map(_shown, details))  # one line per further finding of the same run, folded over layers

    def __reduce__(self) -> tuple[object, ...]:
        return _revived, (
            type(self),
            self.args,
            vars(self),
        )  # workers send errors: Exception's own way knows no keywords

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


def _revived(kind: type[ShardtoolError], arguments: tuple[str, ...], state: dict[str, object]) -> ShardtoolError:
    error = kind.__new__(kind, *arguments)
    vars(error).update(state)
    return error


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


# --- errors that several places give ---------------------------------------------------------------------------------


def reason(error: Exception) -> str:
    """What the system or a library says, without the path, which `where` gives."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (said.splitlines() or [type(error).__name__])[0][:200]


_KINDS = {
    "NoneType": "nothing", "bool": "true or false", "int": "a number", "float": "a number", "str": "a text",
    "bytes": "bytes", "list": "a list", "tuple": "a list", "dict": "a table", "set": "a set", "TensorRef": "a tensor",
}  # fmt: skip


def a_kind(value: object) -> str:
    """What a value is, in words: `a list`, `a number`, `nothing`."""
    name = type(value).__name__
    return _KINDS.get(name, f"a {name}")


def unreadable(where: str, found: str) -> CheckpointError:
    """A file that the system does not give."""
    return CheckpointError(
        "a file cannot be read", where=where, found=found, hint="see that the file is there, whole, and yours to read"
    )


def cut_off(where: str, expected: int, found: int) -> CheckpointError:
    """A file with fewer bytes than what describes it says."""
    return CheckpointError(
        "the file is cut off",
        where=where,
        expected=f"at least {expected} bytes",
        found=f"{found} bytes",
        hint=GET_AGAIN,
    )


def refused_by_the_system(
    error: OSError,
    where: str | None = None,
    found: str | None = None,
    hint: str = "give the same command again when that is mended",
) -> UsageError:
    """No room, no permission, a device that fails: none of it the checkpoint's fault."""
    place = str(error.filename or "") or where
    return UsageError(f"the system refused: {reason(error)}", where=place, found=found, hint=hint)


def unknown_value(name: str, value: object, known: Iterable[str]) -> UsageError:
    """An option with a value that it does not have."""
    return UsageError(
        f"{name} does not know {str(value)!r}", expected=", ".join(known), found=str(value),
        hint=f"give {name} one of the values above",
    )  # fmt: skip


def heads_and_groups(heads: object, groups: object, where: str) -> CheckpointError:
    """Grouped query attention that cannot be."""
    return CheckpointError(
        "the attention heads do not divide into the query groups", where=where,
        expected=f"a number of groups that divides {heads} heads", found=str(groups),
        hint="correct the one that is wrong: the shape of the key projection tells the number of groups",
    )  # fmt: skip


def in_words(error: Exception) -> str:
    """What is wrong with an entry of a config on which a computation failed."""
    if isinstance(error, ZeroDivisionError):
        return "a size of 0, by which another one is divided"
    if isinstance(error, KeyError):
        return f"no entry {error}"
    return (
        f"an entry of another kind: {reason(error)}" if isinstance(error, TypeError | AttributeError) else reason(error)
    )


def no_model(where: str, expected: str, found: str) -> CheckpointError:
    """An entry of a config.json that no model has."""
    return CheckpointError(
        "the config describes no model", where=where, expected=expected, found=found,
        hint="take config.json again from where the model comes from",
    )  # fmt: skip


def too_few_rows(where: str, vocabulary: int, rows: int) -> CheckpointError:
    """An embedding that has no row for some token."""
    return CheckpointError(
        "the embedding has fewer rows than the vocabulary", where=where, expected=f"at least {vocabulary} rows",
        found=f"{rows} rows", hint="correct vocab_size in the args (or in config.json), or copy the ranks that are missing",
    )  # fmt: skip


def no_embedding(where: str) -> CheckpointError:
    """A checkpoint without the tensor that every model begins with."""
    return CheckpointError(
        "the first pipeline stage has no input embedding", where=where, expected="embedding.word_embeddings.weight",
        hint="see with `shardtool inspect` whether this is a GPT model, and copy the first stage again",
    )  # fmt: skip


@contextmanager
def located(name: str, place: str) -> Iterator[None]:
    """Errors from within that name `name` (config.json, args) name `place`, where it lies, in its stead."""
    try:
        yield
    except ShardtoolError as error:
        head, mark, tail = (error.where or "").partition(":")
        if head == name:
            error.where = _shown(place) + mark + tail
        raise
