"""docs/families.md is what scripts/families-page makes of the tables, the refusals and the results that are stored."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from shardtool.families.registry import FAMILIES

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    made = importlib.import_module("families_page").page()
    assert (ROOT / "docs" / "families.md").read_text() == made, "run scripts/families-page"
    for name in FAMILIES:
        assert f"| `{name}` |" in made or f"- `{name}`: " in made
