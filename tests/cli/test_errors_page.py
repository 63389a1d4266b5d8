"""docs/errors.md is what the tests of bad input have seen, and they have seen every error that an input can cause."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import error_sites
import errors_page

# Errors that no input of a test causes: "path:function" or "path:function: text", and the reason
NOT_ON_THE_PAGE: dict[str, str] = {}


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> None:
    """All tests of bad input have run and passed."""
    modules = {Path(str(item.path)).stem for item in request.session.items}
    if not modules >= set(errors_page.SECTIONS) or request.session.testsfailed:
        pytest.skip("needs all tests of bad input in the same run, and all of them passed")


@pytest.mark.usefixtures("everything")
def test_every_error_is_on_the_page() -> None:
    """Or it is in the list of those that no input reaches, with the reason."""
    unseen = {site.name: site.function for site in error_sites.unseen()}
    lacking = [
        f"{name}"
        for name, function in unseen.items()
        if not {name, function, name.partition(":")[0]} & set(NOT_ON_THE_PAGE)
    ]
    assert lacking == [], "these errors need a test whose input causes them, or a reason why there is none"
    listed = set(unseen) | set(unseen.values()) | {name.partition(":")[0] for name in unseen}
    assert [name for name in NOT_ON_THE_PAGE if name not in listed] == [], (
        "these are on the page: take them off the list"
    )


@pytest.mark.usefixtures("everything")
def test_the_page_of_errors() -> None:
    """docs/errors.md holds what the tests of bad input have seen."""
    page = errors_page.render()
    if os.environ.get("SHARDTOOL_WRITE_PAGE"):
        errors_page.PAGE.write_text(page)
    assert errors_page.PAGE.read_text() == page, "docs/errors.md is stale: run scripts/errors-page"
