"""A handful of the runs of scripts/kill-runs, and kills at every step of the end of a run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import killed
from commands import command, done
from shardtool import convert
from shardtool.execute import tiles
from shardtool.layout.mesh import Mesh


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[killed.Case]:
    """The six conversions with their undisturbed results."""
    return killed.cases(tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("number", range(6))
def test_a_killed_run(made: list[killed.Case], tmp_path: Path, number: int) -> None:
    outcome = killed.disturbed(made[number], tmp_path / "dst", random.Random(number), signal.SIGKILL)
    assert outcome.wrong == []


@pytest.mark.parametrize("number", range(3))
def test_an_interrupted_run(made: list[killed.Case], tmp_path: Path, number: int) -> None:
    outcome = killed.disturbed(made[2 * number], tmp_path / "dst", random.Random(number), signal.SIGINT)
    assert outcome.wrong == []


def test_a_run_that_may_not_write_large_files(made: list[killed.Case], tmp_path: Path) -> None:
    assert killed.limited(made[0], tmp_path / "dst", random.Random(0)).wrong == []


# Kills itself at the nth call that changes a directory entry or syncs, once the output is complete
STEPS = """
import os, pathlib, shutil, signal, sys
from shardtool.execute import staging
from shardtool.__main__ import main
left = [int(sys.argv.pop(1))]
def counted(real):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
real = staging._commit
def commit(*arguments):
    pathlib.Path.rename = counted(pathlib.Path.rename)
    os.fsync, os.unlink, os.rmdir = counted(os.fsync), counted(os.unlink), counted(os.rmdir)
    real(*arguments)
staging._commit = commit
main()
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_every_step_of_the_end(tiny_model, tmp_path: Path, overwrite: bool) -> None:
    """After each step DST is absent, old or new, never a part; the next run brings back the old one if it has to."""
    arguments = ["hf2megatron", str(tiny_model("llama")), "--format", "torch"]
    case = killed.Case("tiny", arguments)
    done(*arguments[:2], tmp_path / "undisturbed", *arguments[2:], "-q")
    case.expected = killed.tree(tmp_path / "undisturbed")
    states: list[str] = []
    while len(states) < 40:
        dst = tmp_path / str(len(states)) / "dst"
        dst.parent.mkdir()
        old = killed.write_old(dst) if overwrite else {}
        line = killed.command(arguments, dst, overwrite=overwrite)
        run = subprocess.run(
            [line[0], "-c", STEPS, str(len(states)), *line[3:]], capture_output=True, text=True, check=False
        )
        states.append(killed.state_of(dst, case, old))
        assert states[-1] in ("absent", "old", "new", "replacing")
        again = command(*line[3:])
        assert "starting over" not in again.err
        if states[-1] == "new" and not overwrite:
            assert "the target exists" in again.err
        else:
            assert again.code == 0, again.err
        assert ("the old one is back" in again.err) == (states[-1] == "replacing")
        assert killed.tree(dst) == case.expected
        assert [entry.name for entry in dst.parent.iterdir()] == ["dst"]
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
    assert states[0] == ("old" if overwrite else "absent")
    assert states[-1] == "new"
    assert ("replacing" in states) == overwrite
    assert len(states) > 5


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_bytes_do_not_depend_on_jobs_or_tiles(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Nor on the directory, and the manifest is among them."""
    trees = []
    prepared = convert.prepare_hf2megatron(tiny_model("qwen2"), convert.MegatronOptions(Mesh(2, 2), format=form))
    for number, (jobs, tile, durable) in enumerate([(1, 1 << 20, True), (3, 512, True), (2, 4096, False)]):
        monkeypatch.setattr(tiles, "TILE_BYTES", tile)
        dst = tmp_path / f"{number}"
        convert.execute(prepared, dst, jobs=jobs, durable=durable, tensor_digests=True)
        trees.append(killed.tree(dst))
    assert trees[0] == trees[1] == trees[2]
    assert "shardtool.json" in trees[0]


def test_other_options_or_another_source_start_over(made: list[killed.Case], tmp_path: Path) -> None:
    """A kept run is taken up by its own command only."""
    case, dst = made[2], tmp_path / "dst"
    stage = killed.stage_of(dst)
    stage.mkdir()
    (stage / "output").mkdir()
    (stage / "journal-0.jsonl").write_text(json.dumps({"journal": 1, "key": "another"}) + "\n")
    again = subprocess.run(killed.command(case.arguments, dst), capture_output=True, text=True, check=True)
    assert "is of another run" in again.stderr
    assert "starting over" in again.stderr
    assert killed.tree(dst) == case.expected


def test_the_script_reports(tmp_path: Path) -> None:
    """scripts/kill-runs is these runs, many times."""
    run = subprocess.run([sys.executable, killed.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "--signal" in run.stdout
