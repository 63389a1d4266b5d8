"""How exact a translation is."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from shardtool.errors import UsageError

Level = Literal["identical", "exact", "conditional", "impossible"]
LEVELS: tuple[Level, ...] = ("identical", "exact", "conditional", "impossible")
MEANING = {
    "identical": "the same result, bit for bit, in every dtype",
    "exact": "the same mathematics; rounding differs in low precision",
    "conditional": "the same within the stated condition, which the written config.json enforces",
    "impossible": "the target architecture cannot compute this",
}


class Step(Struct, frozen=True):
    """One thing that a translation does besides renaming and rearranging. `parameters` are those that it adds."""

    what: str
    level: Level = "identical"
    parameters: int = 0


class Verdict(Struct, frozen=True):
    """How exact a translation is, and why.

    `caveats` are true of the result but no difference of the function; `parameters` are those that the target has more.
    """

    source: str
    target: str
    level: Level
    steps: tuple[Step, ...] = ()
    reasons: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    parameters: int = 0

    @property
    def conditions(self) -> tuple[str, ...]:
        """What must hold for the two to be the same."""
        return tuple(step.what for step in self.steps if step.level == "conditional")

    @property
    def within(self) -> Level:
        """How exact it is where the conditions hold."""
        return worst(tuple(step for step in self.steps if step.level != "conditional"))

    def as_dict(self) -> dict[str, Any]:
        """For --json and the manifest."""
        return {
            "source": self.source,
            "target": self.target,
            "level": self.level,
            "within": None if self.level == "impossible" else self.within,
            "conditions": list(self.conditions),
            "steps": [{"what": s.what, "level": s.level, "parameters": s.parameters} for s in self.steps],
            "parameters_added": self.parameters,
            "reasons": list(self.reasons),
            "caveats": list(self.caveats),
        }

    def lines(self) -> list[str]:
        """For people."""
        level = f"{self.level}, {self.within} within" if self.level == "conditional" else self.level
        lines = [f"verdict  {self.source} as {self.target}: {level} ({MEANING[self.level]})"]
        for step in self.steps:
            cost = f" ({step.parameters:+,} parameters)" if step.parameters else ""
            lines.append(f"  {step.level:11} {step.what}{cost}")
        if self.parameters:
            lines.append(f"  in all      {self.parameters:+,} parameters")
        lines += [f"  caveat      {text}" for text in self.caveats]
        return lines + [f"  impossible  {text}" for text in self.reasons]


IMPOSSIBLE = "another --to may hold it; docs/translate.md has the table"


class UntranslatableError(UsageError):
    """The verdict is impossible."""

    kind = "impossible"

    def __init__(self, verdict: Verdict, where: str | None = None, hint: str = IMPOSSIBLE) -> None:
        super().__init__(
            f"this {verdict.source} model cannot be translated to {verdict.target}",
            where=where,
            details=verdict.reasons,
            hint=hint,
        )
        self.verdict = verdict

    def as_dict(self) -> dict[str, object]:
        """The error and the verdict, for `--json`."""
        return {**super().as_dict(), "verdict": self.verdict.as_dict()}


def worst(steps: tuple[Step, ...]) -> Level:
    """The level of all steps together."""
    return max((step.level for step in steps), key=LEVELS.index, default="identical")
