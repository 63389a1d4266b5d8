"""What the tests of bad input share; every refusal goes to the page of errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import errors_page
from commands import Result, command


@pytest.fixture
def refused(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Result]:
    """Run a command that must be refused with an exit code: one error that names `names`, and nothing left behind."""

    def run(code: int, *arguments: object, names: tuple[object, ...] = (), hint: bool = True) -> Result:
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        result = command(*arguments, "-q")
        assert result.code == code, f"{result.command}\n{result.out}\n{result.err}"
        assert result.err.startswith("error: "), result.err
        assert result.err.count("error: ") == 1
        assert "Traceback" not in result.err
        assert "bug in shardtool" not in result.err
        assert "\nhint: " in result.err or not hint, result.err
        for name in names:
            assert str(name) in result.err, f"{name!r} is not in\n{result.err}"
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
        errors_page.record(request.node, result, tmp_path)
        return result

    return run


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint, to be spoiled."""

    def copy(source: Path) -> Path:
        return shutil.copytree(source, tmp_path / "source")

    return copy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The page is compared when every error has been seen."""
    items.sort(key=lambda item: item.name == "test_the_page_of_errors")
