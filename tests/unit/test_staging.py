"""Output is all or nothing: a failed run leaves what was there before, and what the same run can build on."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from shardtool.errors import CheckpointError, Interrupted, UsageError
from shardtool.execute import staging
from shardtool.execute.digests import FileDigest, sha256
from shardtool.execute.files import Finished
from shardtool.execute.journal import Journal, Record
from shardtool.execute.staging import (
    Stage,
    check_destination,
    interruptible,
    recover,
    stage_directory,
    staged,
    write_small,
)


def held(folder: Path) -> dict[str, str]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def src(tmp_path):
    (tmp_path / "src" / "sub").mkdir(parents=True)
    return tmp_path / "src"


def test_a_free_place(src, tmp_path):
    check_destination(src, tmp_path / "dst", overwrite=False)
    check_destination(src, tmp_path / "not" / "yet" / "there", overwrite=False)
    check_destination(src, tmp_path / "src2", overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dst", ["src", "src/sub", "src/new", ".", "src/../src", "link"])
def test_source_and_target_overlap(src, tmp_path, dst, overwrite):
    (tmp_path / "link").symlink_to(src)
    with pytest.raises(UsageError, match="overlap"):
        check_destination(src, tmp_path / dst, overwrite=overwrite)


def test_a_target_that_exists(src, tmp_path):
    (tmp_path / "dst").mkdir()
    with pytest.raises(UsageError, match="exists") as error:
        check_destination(src, tmp_path / "dst", overwrite=False)
    assert "--overwrite" in str(error.value.hint)
    check_destination(src, tmp_path / "dst", overwrite=True)


def test_a_target_that_is_no_directory(src, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "alias", "dangling"):
        with pytest.raises(UsageError, match="exists"):
            check_destination(src, tmp_path / name, overwrite=False)
        with pytest.raises(UsageError, match="not a directory"):
            check_destination(src, tmp_path / name, overwrite=True)


def finish(stage: Stage, name: str, text: str) -> None:
    """Write a file of tensors, and note it as finished."""
    write_small(stage.tensors / name, text.encode())
    found = (stage.tensors / name).stat()
    stage.add(Finished(name, found.st_size, found.st_mtime_ns, FileDigest(sha256(text.encode()), {})))


def cut_off(dst: Path, *, key: str = "key", error: BaseException | None = None) -> None:
    """A run that finished one file and began another, and was interrupted."""
    with pytest.raises(Interrupted), staged(dst, key) as stage:
        finish(stage, "a", "done")
        write_small(stage.tensors / "b", b"half")
        raise error or KeyboardInterrupt


def test_a_run_that_ends_well(tmp_path):
    dst = tmp_path / "deep" / "dst"
    with staged(dst, "key", subdirectory="sub") as stage:
        assert stage.output.parent.parent == dst.parent
        assert stage.tensors == stage.output / "sub"
        assert not dst.exists()
        write_small(stage.tensors / "a", b"new")
    assert held(dst) == {"sub/a": "new"}
    assert list(dst.parent.iterdir()) == [dst]


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, OSError(5, "input/output error"), UsageError("wrong", hint="mend it")]
)
def test_a_run_that_fails_with_nothing_finished_leaves_nothing(tmp_path, error):
    write_small(tmp_path / "old" / "a", b"old")
    for dst in (tmp_path / "dst", tmp_path / "old"):
        with pytest.raises((ValueError, Interrupted, UsageError)), staged(dst, "key") as stage:
            write_small(stage.tensors / "a", b"half")
            raise error
    assert held(tmp_path) == {"old/a": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]


def test_an_interrupted_run_is_continued(tmp_path):
    cut_off(tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert sorted(path.name for path in (stage_directory(tmp_path / "dst") / "output").iterdir()) == ["a"]
    said: list[str] = []
    with staged(tmp_path / "dst", "key", say=said.append) as stage:
        assert stage.finished.keys() == {"a"}
        write_small(stage.tensors / "b", b"whole")
    assert held(tmp_path) == {"dst/a": "done", "dst/b": "whole"}
    assert said == []


def test_what_an_interrupted_run_says(tmp_path):
    with pytest.raises(Interrupted) as caught, staged(tmp_path / "dst", "key") as stage:
        finish(stage, "a", "done")
        raise KeyboardInterrupt
    assert caught.value.what == f"interrupted; 1 finished file kept in {tmp_path}/.dst.shardtool"
    assert "same command continues" in str(caught.value.hint)
    assert caught.value.exit_code == 130


def test_an_interrupt_after_the_last_rename(tmp_path, monkeypatch):
    def late(_: Path) -> None:
        if (tmp_path / "dst").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(staging, "_sync", late)
    with pytest.raises(Interrupted, match="dst is complete"), staged(tmp_path / "dst", "key") as stage:
        finish(stage, "a", "new")
    assert held(tmp_path) == {"dst/a": "new"}


def gone() -> CheckpointError:
    error = CheckpointError("a file cannot be read", hint="mend it")
    error.__cause__ = FileNotFoundError(2, "gone")
    return error


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (OSError(errno.ENOSPC, "no space left"), True),
        (OSError(errno.EIO, "input/output error"), True),
        (gone(), True),
        (MemoryError(), True),
        (SystemExit(3), True),
        (CheckpointError("copies of the same weights differ", hint="mend it"), False),
        (ZeroDivisionError("a bug"), False),
    ],
)  # fmt: skip
def test_what_a_repetition_can_mend_keeps_what_is_finished(tmp_path, error, kept):
    dst = tmp_path / "dst"
    with pytest.raises(BaseException) as caught, staged(dst, "key") as stage:
        finish(stage, "a", "done")
        raise error
    assert stage_directory(dst).exists() == kept
    if isinstance(caught.value, UsageError | CheckpointError):
        assert ("the same command continues" in str(caught.value.hint)) == kept
    with staged(dst, "key") as stage:
        assert stage.finished.keys() == ({"a"} if kept else set())


def test_a_full_disk_is_said_with_numbers(tmp_path):
    with pytest.raises(UsageError) as caught, staged(tmp_path / "dst", "key"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "No space left" in caught.value.what
    assert "bytes free" in str(caught.value.found)


def test_space_is_looked_for_before_anything_is_written(tmp_path):
    with staged(tmp_path / "dst", "key") as stage:
        stage.check_space(1)
    with pytest.raises(UsageError, match="not enough disk space") as caught, staged(tmp_path / "two", "key") as stage:
        finish(stage, "a", "done")
        stage.check_space(1 << 60)
    assert str(1 << 60) in str(caught.value.expected)
    assert str(caught.value.found).endswith("bytes free")
    assert stage_directory(tmp_path / "two").exists()


def test_another_run_starts_over_and_says_so(tmp_path):
    cut_off(tmp_path / "dst", key="one")
    said: list[str] = []
    with staged(tmp_path / "dst", "two", say=said.append) as stage:
        assert stage.finished == {}
        write_small(stage.tensors / "c", b"new")
    assert held(tmp_path) == {"dst/c": "new"}
    assert len(said) == 1
    assert "starting over" in said[0]


def test_a_finished_file_that_is_not_what_it_was_is_written_again(tmp_path):
    for change in (
        lambda file: file.write_text("DONE"),  # the size is right
        lambda file: file.write_text("longer"),
        lambda file: file.unlink(),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.rename(tmp_path / "elsewhere"), file.symlink_to(tmp_path / "elsewhere")),
    ):
        cut_off(tmp_path / "dst")
        file = stage_directory(tmp_path / "dst") / "output" / "a"
        change(file)
        if file.is_dir():
            shutil.rmtree(file)
        with staged(tmp_path / "dst", "key") as stage:
            assert stage.finished == {}
            assert [path for path in stage.output.rglob("*") if path.is_file()] == []
        shutil.rmtree(tmp_path / "dst")


def test_a_finished_file_with_another_time_is_read_again(tmp_path):
    cut_off(tmp_path / "dst")
    os.utime(stage_directory(tmp_path / "dst") / "output" / "a")
    with staged(tmp_path / "dst", "key") as stage:
        assert stage.finished.keys() == {"a"}


def test_without_sync_nothing_is_built_on(tmp_path):
    with pytest.raises(Interrupted, match="nothing was left"), staged(tmp_path / "dst", "key", durable=False) as stage:
        finish(stage, "a", "x")
        raise KeyboardInterrupt
    for durable in (True, False):  # and what a crash of such a run has left is not taken up
        write_small(stage_directory(tmp_path / "dst") / "output" / "a", b"x")
        journal = Journal(stage_directory(tmp_path / "dst"), "key" + staging.NOT_DURABLE)
        journal.finished("a", Record(1, 0, sha256(b"x")))
        journal.close()
        with staged(tmp_path / "dst", "key", durable=durable) as stage:
            assert stage.finished == {}
        shutil.rmtree(tmp_path / "dst")


def test_overwrite_swaps_whole_directories(tmp_path):
    write_small(tmp_path / "dst" / "a", b"old")
    write_small(tmp_path / "dst" / "gone", b"old")
    with staged(tmp_path / "dst", "key") as stage:
        write_small(stage.tensors / "a", b"new")
        assert held(tmp_path / "dst") == {"a": "old", "gone": "old"}
    assert held(tmp_path) == {"dst/a": "new"}


@pytest.mark.parametrize("error", [OSError(5, "input/output error"), KeyboardInterrupt()])
def test_a_swap_that_fails_is_undone(tmp_path, monkeypatch, error):
    write_small(tmp_path / "dst" / "a", b"old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "output":
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((UsageError, Interrupted)), staged(tmp_path / "dst", "key") as stage:
        write_small(stage.tensors / "a", b"new")
    assert held(tmp_path) == {"dst/a": "old"}


def cut_off_while_replacing(tmp_path: Path) -> Path:
    """What a crash between the two renames leaves: no DST, the old one aside, the new one whole."""
    dst = tmp_path / "dst"
    cut_off(dst)
    write_small(stage_directory(dst) / "replaced" / "a", b"old")
    return dst


def test_a_crash_between_the_renames_brings_the_old_one_back(tmp_path):
    dst = cut_off_while_replacing(tmp_path)
    said: list[str] = []
    recover(dst, said.append)
    assert held(dst) == {"a": "old"}
    assert "the old one is back" in said[0]
    with staged(dst, "key") as stage:
        assert stage.finished.keys() == {"a"}
    assert held(tmp_path) == {"dst/a": "done"}


def test_the_old_one_comes_back_before_the_next_run_begins(tmp_path):
    dst = cut_off_while_replacing(tmp_path)
    with pytest.raises(ZeroDivisionError), staged(dst, "other"):
        assert held(dst) == {"a": "old"}
        raise ZeroDivisionError
    assert held(tmp_path) == {"dst/a": "old"}


@pytest.mark.parametrize("name", ["replaced", "discarded"])
def test_a_crash_while_the_old_one_is_removed(tmp_path, name):
    dst = tmp_path / "dst"
    write_small(dst / "a", b"new")
    write_small(stage_directory(dst) / name / "a", b"old")
    if name == "replaced":
        write_small(stage_directory(dst) / "discarded" / "b", b"older")
    recover(dst)
    assert held(tmp_path) == {"dst/a": "new"}


def test_a_stage_of_which_only_half_was_removed_is_nothing(tmp_path):
    """`discarded` may be incomplete: it never becomes DST again."""
    dst = tmp_path / "dst"
    write_small(stage_directory(dst) / "discarded" / "a", b"half")
    recover(dst)
    assert list(tmp_path.iterdir()) == []


def test_recovery_leaves_a_run_alone_that_can_be_continued(tmp_path):
    cut_off(tmp_path / "dst")
    recover(tmp_path / "dst")
    with staged(tmp_path / "dst", "key") as stage:
        assert stage.finished.keys() == {"a"}
        recover(tmp_path / "dst")  # somebody works on it
        assert stage.output.exists()


def test_a_first_swap_that_fails(tmp_path, monkeypatch):
    """Whether the journal cannot be begun, or DST cannot get its name."""
    real = Path.rename
    for name in ("journal-0.new", "output"):

        def rename(self: Path, target: Path, name: str = name) -> Path:
            if self.name == name:
                raise OSError(28, "no space")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(UsageError, match="no space"), staged(tmp_path / "dst", "key"):
            pass
        assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"), staged(tmp_path / "file" / "dst", "key"):
        pass


def test_two_runs_do_not_work_on_one_target(tmp_path):
    with staged(tmp_path / "dst", "key") as one:
        write_small(one.tensors / "a", b"1")
        with pytest.raises(UsageError, match="another process works") as caught, staged(tmp_path / "dst", "key"):
            pass
        assert f"process {os.getpid()}" in str(caught.value.found)
    assert held(tmp_path) == {"dst/a": "1"}


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with staged(tmp_path / "dst", "key", say=said.append) as stage:
        write_small(stage.tensors / "a", b"1")
    assert "has no locks" in said[0]
    assert held(tmp_path) == {"dst/a": "1"}


def test_processes_that_share_a_run(tmp_path):
    """Each notes what it has finished; the next run, of any number of processes, goes on from all of it."""
    dst = tmp_path / "dst"
    with pytest.raises(Interrupted, match="2 finished files"), staged(dst, "key", subdirectory="sub") as first:
        first.journal.learned("replicas_compared", 7)
        second = Stage.join(first.directory, "sub", 1)
        assert (second.tensors, second.finished) == (first.tensors, {})
        finish(first, "a", "1")
        finish(second, "b", "2")
        second.journal.close()
        assert first.records().keys() == {"a", "b"}
        raise KeyboardInterrupt
    with staged(dst, "key", subdirectory="sub") as first:
        assert first.finished.keys() == Stage.join(first.directory, "sub", 1).finished.keys() == {"a", "b"}
        assert first.journal.facts == {"replicas_compared": 7}
        assert first.records().keys() == {"a", "b"}
    assert held(tmp_path) == {"dst/sub/a": "1", "dst/sub/b": "2"}


def test_an_interrupt_before_the_work_begins(tmp_path):
    with pytest.raises(Interrupted, match="nothing was left behind"), interruptible(tmp_path / "dst"):
        raise KeyboardInterrupt
    cut_off(tmp_path / "dst")
    with pytest.raises(Interrupted, match="1 finished file kept") as caught, interruptible(tmp_path / "dst"):
        raise KeyboardInterrupt
    assert "same command continues" in str(caught.value.hint)
