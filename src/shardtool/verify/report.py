"""What `verify` says: named levels, each with its question, its answer and what it cannot see.

The levels `accounting` and `exact` come from the plan engine, `logits` from this folder (design: *verify answers three
questions*). A level that was not run has `passed` None; nothing run is not a pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct, field

QUESTIONS = {
    "accounting": ("is every element of the one in the other?", "order inside a tensor"),
    "exact": ("the plan, executed as compare: bit-identical?", "a wrong equation, which is used both ways"),
    "logits": ("do both models compute the same function?", "weights that no prompt exercises"),
}


class Level(Struct, frozen=True):
    """One question and its answer. `numbers` is plain data for `--json`, `lines` the same for people."""

    name: str
    passed: bool | None
    numbers: Mapping[str, object] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The level as plain data."""
        question, blind = QUESTIONS.get(self.name, ("", ""))
        return {
            "level": self.name,
            "question": question,
            "blind_to": blind,
            "passed": self.passed,
            "problems": list(self.problems),
            **self.numbers,
        }


class VerifyReport(Struct, frozen=True):
    """The answer to *is this the same model?*: the two sides by name, and the levels in the order they were asked."""

    a: str
    b: str
    levels: tuple[Level, ...]

    @property
    def passed(self) -> bool:
        """True when at least one level was run and every one that was run passed."""
        answers = [level.passed for level in self.levels if level.passed is not None]
        return bool(answers) and all(answers)

    @property
    def exit_code(self) -> int:
        """0 when the models are the same, 1 when they differ or nothing was compared."""
        return 0 if self.passed else 1

    def as_dict(self) -> dict[str, object]:
        """The report as plain data, for `--json`."""
        return {"same": self.passed, "a": self.a, "b": self.b, "levels": [level.as_dict() for level in self.levels]}

    def lines(self) -> list[str]:
        """The report as lines of text."""
        result = [f"a: {self.a}", f"b: {self.b}"]
        for level in self.levels:
            question, blind = QUESTIONS.get(level.name, ("", ""))
            answer = {True: "yes", False: "NO", None: "not asked"}[level.passed]
            result.append(f"{level.name}: {question} {answer}")
            result += [f"  {line}" for line in level.lines]
            result += ["  ! " + problem.replace("\n", "\n    ") for problem in level.problems]
            if level.passed:
                result.append(f"  blind to: {blind}")
        verdict = "the same model" if self.passed else "NOT the same model"
        if not any(level.passed is not None for level in self.levels):
            verdict = "nothing was compared"
        return [*result, verdict]


class Distance(Struct, frozen=True):
    """How far two sets of logits, and the hidden states behind them, are apart. NaN is *not measured*.

    `max_abs` = max |a - b| and `std` = std(a), over `positions` x `vocab_size` logits; `worst` is where the maximum is.
    Where every position has a bound of its own (rounding), `max_abs`, `worst` and `bound` are of the position that is
    farthest beyond its bound, and `largest` is max |a - b| over all.
    `kl_max`, `kl_mean`: KL(a || b) per position in nats, summed over the vocabulary. `top1`: the share of positions
    where both prefer the same token. `layers`: per traced point (embedding, after each layer, final norm) the largest
    relative L2 distance of a hidden state.
    """

    positions: int = 0
    vocab_size: int = 0
    max_abs: float = math.nan
    std: float = math.nan
    bound: float = math.nan
    largest: float = math.nan
    worst: str = ""
    kl_max: float = math.nan
    kl_mean: float = math.nan
    top1: float = math.nan
    layers: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """max |a - b| / std(a), the metric that decides."""
        return self.max_abs / self.std if self.std > 0 else math.nan

    def as_dict(self) -> dict[str, object]:
        """The measurements as plain data; None for what was not measured (JSON has no NaN)."""
        names = ("ratio", "max_abs", "std", "largest", "kl_max", "kl_mean", "top1")
        return {
            "positions": self.positions,
            "vocab_size": self.vocab_size,
            **{name: _finite(getattr(self, name)) for name in names},
            "worst": self.worst,
            "layers": [_finite(value) for value in self.layers],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class LogitsReport(Struct, frozen=True):
    """The answer of the logits level: passes when `measured.ratio` is at or below `threshold` and nothing went wrong.

    `threshold_from` says where the threshold comes from, `coverage` what the prompts reach, `first_diverging` the first
    traced point that is farther apart than the threshold (None: none). `problems`: a side that cannot be loaded whole,
    NaN, nothing compared, different vocabularies. `seconds` per run.
    """

    a: str
    b: str
    dtype: str
    threshold: float
    threshold_from: str
    measured: Distance = field(default_factory=Distance)
    first_diverging: str | None = None
    coverage: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """max |a - b| / std(a); NaN when it was not measured."""
        return self.measured.ratio

    @property
    def passed(self) -> bool:
        """True when something was compared, nothing went wrong on the way and the ratio is within the threshold."""
        return not self.problems and self.measured.positions > 0 and self.ratio <= self.threshold

    @property
    def exit_code(self) -> int:
        """0 when the models agree; 1 when they differ, a side could not be loaded whole, or nothing was compared."""
        return 0 if self.passed else 1

    def level(self) -> Level:
        """The report as the level `logits` of a VerifyReport."""
        numbers = {
            **self.measured.as_dict(),
            "threshold": _finite(self.threshold),
            "threshold_from": self.threshold_from,
            "dtype": self.dtype,
            "first_diverging": self.first_diverging,
            "coverage": list(self.coverage),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }
        return Level("logits", self.passed, numbers, tuple(self.lines()), self.problems)

    def as_dict(self) -> dict[str, object]:
        """The report as plain data, for `--json`."""
        return {"a": self.a, "b": self.b, **self.level().as_dict()}

    def lines(self) -> list[str]:
        """The measurements as lines of text, without the problems."""
        found = self.measured
        if not found.positions:
            return ["nothing was compared"]
        rows = [
            ("max |a - b| / std(a)", f"{found.ratio:.2e}   (threshold {self.threshold:.1e}: {self.threshold_from})"),
            ("max |a - b|", f"{found.max_abs:.2e}   at {found.worst}"),
            *([("largest anywhere", f"{found.largest:.2e}")] if math.isfinite(found.bound) else []),
            ("KL(a || b) per position", f"{found.kl_max:.2e} at most, {found.kl_mean:.2e} on average"),
            ("same top token", f"{found.top1:.2%}"),
            ("first diverging layer", self.first_diverging or "none"),
            ("compared", f"{found.positions} positions x {found.vocab_size} tokens in {self.dtype}"),
            *(("", line) for line in self.coverage),
        ]
        return [f"{name:<24} {text}" for name, text in rows]
