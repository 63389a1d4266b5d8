"""What a diff says: findings, one per kind of tensor, with what is known of each difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from shardtool.diff.permutations import Diagnosis

Kind = Literal["missing", "extra", "shape", "dtype", "values", "copies"]
KINDS: Mapping[Kind, str] = {
    "missing": "in a, not in b",
    "extra": "in b, not in a",
    "shape": "another shape",
    "dtype": "another dtype",
    "values": "other values",
    "copies": "copies of one tensor that differ from each other",
}


class Finding(Struct, frozen=True):
    """One difference: of which kind, in which tensors (`a` and `b`: their names on each side, layers folded).

    `elements` were compared, `differing` of them differ. `detail` is what else there is to say.
    """

    kind: Kind
    a: tuple[str, ...]
    b: tuple[str, ...]
    diagnoses: tuple[Diagnosis, ...] = ()
    detail: str = ""
    elements: int = 0
    differing: int = 0

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "kind": self.kind,
            "a": list(self.a),
            "b": list(self.b),
            "diagnoses": [{"code": item.code, "text": item.text} for item in self.diagnoses],
            "detail": self.detail,
            "elements": self.elements,
            "differing": self.differing,
        }

    @property
    def line(self) -> str:
        """The tensors, and how much of them differs."""
        names = self.b or self.a
        shown = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        return shown + (f": {self.differing:,} of {self.elements:,} elements" if self.elements else "")

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is known of the difference."""
        return (*(item.text for item in self.diagnoses), *([self.detail] if self.detail else []))


class DiffReport(Struct, frozen=True):
    """Two checkpoints, what differs, and how many elements were compared. `notes` is what is no difference of tensors."""

    a: str
    b: str
    labels: tuple[str, str]
    elements: int
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def same(self) -> bool:
        """True where something was compared and nothing differs."""
        return self.elements > 0 and not self.findings

    @property
    def exit_code(self) -> int:
        """0 when both hold the same tensors; 1 when they do not, or nothing was compared."""
        return 0 if self.same else 1

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "same": self.same,
            "a": self.a,
            "b": self.b,
            "formats": list(self.labels),
            "elements": self.elements,
            "findings": [item.as_dict() for item in self.findings],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"a: {self.a} ({self.labels[0]})", f"b: {self.b} ({self.labels[1]})"]
        groups: dict[tuple[Kind, tuple[str, ...]], list[str]] = {}
        for finding in self.findings:
            groups.setdefault((finding.kind, finding.reasons), []).append(finding.line)
        for (kind, reasons), names in groups.items():
            lines += [f"{kind if at == 0 else '':<8} {name}" for at, name in enumerate(names)]
            lines += [f"{'':<11}{reason}" for reason in reasons]
        lines += [f"note: {note}" for note in self.notes]
        if self.same:
            return [*lines, f"the same: {self.elements:,} elements compared"]
        if not self.elements and not self.findings:
            return [*lines, "nothing was compared"]
        counts = [(kind, sum(item.kind == kind for item in self.findings)) for kind in KINDS]
        found = ", ".join(f"{count} {kind}" for kind, count in counts if count)
        return [*lines, f"different: {found}; {self.elements:,} elements compared"]
