"""A short run of scripts/fuzz: no wrong output, no hang, no traceback, nothing executed, whatever is broken."""

from __future__ import annotations

from pathlib import Path

from fuzzing.campaign import Counts, campaign
from fuzzing.seeds import READERS


def test_broken_inputs_are_refused_or_read_right(tmp_path: Path) -> None:
    counts = Counts()
    for counts in campaign(tmp_path, READERS, count=144):  # noqa: B007 - the counts after the last run
        pass
    assert counts.runs == 144 and set(counts.by_reader) == set(READERS)
    assert not counts.findings, "\n\n".join(
        f"#{item['number']} {item['text']}\n{item['err']}" for item in counts.findings
    )
    assert counts.refused > 70 and counts.accepted > 5
