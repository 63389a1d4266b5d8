"""Output is all or nothing: a failed run leaves what was there before, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shardtool.errors import UsageError
from shardtool.execute.staging import check_destination, staged, write_small


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


def test_a_run_that_ends_well(tmp_path):
    dst = tmp_path / "deep" / "dst"
    with staged(dst) as stage:
        assert stage.parent == dst.parent
        assert not dst.exists()
        write_small(stage / "sub" / "a", b"new")
    assert held(dst) == {"sub/a": "new"}
    assert list(dst.parent.iterdir()) == [dst]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "dst") as stage:
        write_small(stage / "a", b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_what_was_there(tmp_path, error):
    write_small(tmp_path / "dst" / "a", b"old")
    with pytest.raises(error), staged(tmp_path / "dst") as stage:
        write_small(stage / "a", b"new")
        raise error
    assert held(tmp_path) == {"dst/a": "old"}


def test_overwrite_swaps_whole_directories(tmp_path):
    write_small(tmp_path / "dst" / "a", b"old")
    write_small(tmp_path / "dst" / "gone", b"old")
    with staged(tmp_path / "dst") as stage:
        write_small(stage / "a", b"new")
        assert held(tmp_path / "dst") == {"a": "old", "gone": "old"}
    assert held(tmp_path) == {"dst/a": "new"}


def test_a_swap_that_fails_is_undone(tmp_path, monkeypatch):
    write_small(tmp_path / "dst" / "a", b"old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".shardtool-" in self.name:
            raise OSError(5, "input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="input/output"), staged(tmp_path / "dst") as stage:
        write_small(stage / "a", b"new")
    assert held(tmp_path) == {"dst/a": "old"}


def test_a_first_swap_that_fails(tmp_path, monkeypatch):
    def rename(self: Path, target: Path) -> Path:
        raise OSError(28, "no space")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no space"), staged(tmp_path / "dst"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"), staged(tmp_path / "file" / "dst"):
        pass


def test_two_runs_do_not_share_a_stage(tmp_path):
    with staged(tmp_path / "dst") as one:
        write_small(one / "a", b"1")
        with staged(tmp_path / "dst") as two:
            assert one != two
            write_small(two / "a", b"2")
        shutil.rmtree(tmp_path / "dst")
    assert held(tmp_path) == {"dst/a": "1"}
