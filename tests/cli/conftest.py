"""What the tests of bad input share; every refusal goes to the page of errors."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import error_sites
import errors_page
from commands import Result, command
from shardtool.cli.main import INTERRUPTED

# what Python reports when something looks up a name for a pickle, or starts a program
EXECUTES = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen")
SECONDS, MEMORY = 10, 512 << 10  # of processor time, and KiB more than the process has taken before
Meanwhile = Callable[[str, int, Callable[[], object]], None]


@pytest.fixture
def refused(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Result]:
    """Run a command that must be refused with an exit code: one error that names `names` and what to do about it.

    Nothing is left behind, unless the command may `keep` what it has finished. With `report` the error is part of a
    report on stdout. For hostile input: it takes neither long nor much memory, and nothing is executed or looked up.
    """
    hostile = Path(str(request.node.path)).stem.startswith("test_hostile")

    def run(
        code: int, *arguments: object, names: tuple[object, ...] = (), keep: bool = False, report: bool = False
    ) -> Result:
        absent = [argument for argument in arguments if isinstance(argument, Path) and not argument.exists()]
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        began, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with error_sites.watched() as made, _listening() as executed:
            result = command(*arguments, "-q")
        if hostile:
            assert executed == []
            assert time.process_time() - began < SECONDS
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY
        error_sites.note(made, result.err + result.out)
        assert result.code == code, f"{result.command}\n{result.out}\n{result.err}"
        said = result.out if report else result.err
        assert said.startswith(_beginning(code, report)), said
        assert result.err.count("error: ") == (code != INTERRUPTED and not report)
        assert "Traceback" not in result.err
        assert "bug in shardtool" not in result.err
        assert report or "\nhint: " in said, said
        for name in names:
            assert str(name) in said, f"{name!r} is not in\n{said}"
        assert not any(path.exists() for path in absent), "DST is there"
        assert keep or sorted(str(path) for path in tmp_path.rglob("*")) == before
        errors_page.record(request.node, result, said, tmp_path)
        return result

    return run


def _beginning(code: int, report: bool) -> str:
    if report:
        return ""
    return "interrupted" if code == INTERRUPTED else "error: "


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint, to be spoiled."""

    def copy(source: Path) -> Path:
        return shutil.copytree(source, tmp_path / "source")

    return copy


_executed: list[list[str]] = []


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What is executed within it, as the names of Python's audit events."""
    _add_hook()
    _executed.append([])
    try:
        yield _executed[-1]
    finally:
        _executed.clear()


def _add_hook() -> None:
    if not getattr(sys, "_shardtool_tests_listen", False):
        sys.addaudithook(_opened)  # cannot be taken away again
        sys._shardtool_tests_listen = True  # type: ignore[attr-defined]


_watching: list[tuple[str, list[int], Callable[[], object]]] = []


def _opened(event: str, arguments: tuple[object, ...]) -> None:
    if _executed and event in EXECUTES:
        _executed[-1].append(event)
    if not _watching or event != "open":
        return
    for entry in list(_watching):
        ending, left, action = entry
        if str(arguments[0]).endswith(ending):
            left[0] -= 1
            if left[0] == 0:
                _watching.remove(entry)
                action()


@pytest.fixture
def meanwhile() -> Iterator[Meanwhile]:
    """`meanwhile("config.json", 2, action)`: when a file of this name is opened for the second time, something happens.

    So another process's doing falls into the same moment of every run.
    """
    _add_hook()
    yield lambda ending, count, action: _watching.append((ending, [count], action))
    _watching.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The page is compared when every error has been seen."""
    items.sort(key=lambda item: Path(str(item.path)).stem == "test_errors_page")
