"""All or nothing: output is made in a directory beside the target, synced, and renamed into place once.

`.DST.shardtool/` belongs to one run at a time and holds

    lock               locked (flock) while a process works on this target
    journal-N.jsonl    what process N of the run has finished: see execute.journal
    output/            what becomes DST
    replaced/          the old DST (--overwrite), from the moment before the new one takes its place until it is there
    discarded/         the old DST while it is removed

At every moment DST is absent, the old one, or the new one, whole. Where a crash hit between the two renames of a
replacement, the next run puts the old one back before it does anything else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from shardtool.errors import Interrupted, ShardtoolError, UsageError, reason, refused_by_the_system
from shardtool.execute.digests import hash_file
from shardtool.execute.files import Finished
from shardtool.execute.journal import PATTERN, Entries, Journal, Record, read_all, read_entries
from shardtool.execute.ranks import RankError

FIRST = PATTERN.replace("*", "0")  # the journal of the process that has the lock
NOT_DURABLE = ", not durable"
CONTINUE = "the same command continues where this one stopped"
AGAIN = "give the same command again when that is mended"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
Say = Callable[[str], None]


def _quiet(_: str) -> None:
    """Say nothing."""


def stage_directory(dst: Path) -> Path:
    """Where a run for this target works."""
    place = dst.absolute()
    return place.parent / f".{place.name}.shardtool"


def check_destination(src: Path, dst: Path, *, overwrite: bool) -> None:
    """Raises UsageError when DST is inside SRC or contains it, or exists (without --overwrite, or as no directory)."""
    source, target = src.resolve(), dst.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        raise UsageError(
            "the target and the source overlap",
            where=str(dst),
            expected=f"a directory outside {src}",
            hint="choose another DST",
        )
    if dst.exists() or dst.is_symlink():
        if not overwrite:
            raise UsageError("the target exists", where=str(dst), hint="choose another DST, or give --overwrite")
        if not dst.is_dir() or dst.is_symlink():
            raise UsageError("the target is not a directory", where=str(dst), hint="choose another DST")


def recover(dst: Path, say: Say = _quiet) -> None:
    """Put right what a crash at the end of a run has left: the old DST comes back where the new one did not yet come.

    Does nothing while another process works on this target.
    """
    directory = stage_directory(dst)
    if not directory.is_dir():
        return
    try:
        lock = _Lock(directory)
    except UsageError:
        return
    with lock:
        _restore(dst, directory, say)
        if not (directory / "output").exists():
            shutil.rmtree(directory)


def _restore(dst: Path, directory: Path, say: Say) -> None:
    aside = directory / "replaced"
    if not aside.exists():
        return
    if dst.exists():
        _discard(aside)
    else:
        aside.rename(dst)
        _sync(dst.absolute().parent)
        say(f"{dst}: a run was cut off while it replaced this directory; the old one is back")


def _discard(aside: Path) -> None:
    """Remove an old DST. Half of it must not come back after a crash: it gets another name first."""
    discarded = aside.with_name("discarded")
    if discarded.exists():
        shutil.rmtree(discarded)
    aside.rename(discarded)
    shutil.rmtree(discarded)


class Stage:
    """The work on one target: `output` becomes DST, the files of `finished` (below `tensors`) are there already.

    The process that has the lock makes it; the others of a run that several processes share `join`.
    """

    def __init__(
        self, directory: Path, key: str, subdirectory: str, *, durable: bool = True, say: Say = _quiet
    ) -> None:
        self.directory, self.key = directory, key if durable else key + NOT_DURABLE
        self.output = directory / "output"
        self.tensors = self.output / subdirectory
        known = read_all(directory)
        go_on = durable and known.key == key and self.output.is_dir()
        if known.key and not go_on and self.output.is_dir():
            say(f"{directory} is of another run (other options, another source or version): starting over")
        if not go_on:
            shutil.rmtree(self.output, ignore_errors=True)
            known = Entries()
        self.tensors.mkdir(parents=True, exist_ok=True)
        self.finished = {name: record for name, record in known.files.items() if self._holds(name, record)}
        self.journal = Journal(directory, self.key, 0, replace(known, files=self.finished))
        for path in directory.glob(PATTERN):
            if path.name != FIRST:
                path.unlink()
        self.remove_unfinished(self.finished)

    @classmethod
    def join(cls, directory: Path, subdirectory: str, rank: int) -> Stage:
        """The stage that another process has made, to write a share of its files."""
        stage = cls.__new__(cls)
        stage.directory = directory
        stage.output = stage.directory / "output"
        stage.tensors = stage.output / subdirectory
        known = read_entries(stage.directory / FIRST)
        stage.key, stage.finished = known.key, known.files
        stage.journal = Journal(stage.directory, known.key, rank, Entries(known.key, {}, known.facts))
        return stage

    def records(self) -> dict[str, Record]:
        """Every file that is finished by now, whichever process wrote it."""
        return read_all(self.directory).files

    def _holds(self, name: str, record: Record) -> bool:
        """Whether a file of the journal is what it was. It is read again only where its time says that it was touched."""
        file = self.tensors / name
        try:
            found = file.lstat()
            if found.st_size != record.size or not file.is_file() or file.is_symlink():
                return False
            return found.st_mtime_ns == record.mtime_ns or (bool(record.sha256) and hash_file(file) == record.sha256)
        except OSError:
            return False

    def remove_unfinished(self, finished: Iterable[str]) -> None:
        """Remove every file of the output that is not among the finished ones (names below `tensors`)."""
        held = {self.tensors / name for name in finished}
        for root, _, files in os.walk(self.output):
            for name in files:
                file = Path(root, name)
                if file not in held:
                    file.unlink()

    def add(self, file: Finished) -> None:
        """A file below `tensors` is complete."""
        sha256, spans = file.digest or ("", {})
        self.journal.finished(file.name, Record(file.size, file.mtime_ns, sha256, spans))

    def check_space(self, needed: int) -> None:
        """Raises UsageError when the file system has less room than these bytes, beside what is written already."""
        found = os.statvfs(self.output)
        free = found.f_bavail * found.f_frsize
        if found.f_blocks and free < needed:
            raise UsageError(
                "not enough disk space",
                where=str(self.output.parent.parent),
                expected=f"{needed} bytes",
                found=f"{free} bytes free",
                hint="free some space, or choose a DST on another file system",
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def staged(dst: Path, key: str, *, subdirectory: str = "", durable: bool = True, say: Say = _quiet) -> Iterator[Stage]:
    """A stage whose output becomes `dst` when the block ends well. `key` is a digest of all that makes the output.

    A `dst` that exists is put aside first and removed last. When the block fails with an error that a repetition may
    mend (the system refused, a source was not there, an interrupt), finished files stay for the next run with the same
    key, and the error says so; after any other nothing stays. Without `durable` nothing is built on later: what is not on
    the device may be lost. Raises UsageError where another process works on `dst`.
    """
    directory = stage_directory(dst)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = _Lock(directory, say)
    except OSError as error:
        raise UsageError(
            "the target cannot be made", where=str(dst), found=reason(error),
            hint="choose a DST below a directory that is there and yours to write to",
        ) from error  # fmt: skip
    with lock:
        stage = None
        try:
            _restore(dst, directory, say)
            stage = Stage(directory, key, subdirectory, durable=durable, say=say)
            yield stage
            _commit(dst, directory)
            stage.journal.close()
        except BaseException as error:
            complete = dst.exists() and not (directory / "output").exists()
            kept = _leave(dst, directory, stage, error)
            explained = _explained(error, dst, directory, kept, complete)
            if explained is error:
                raise
            raise explained from error


def _commit(dst: Path, directory: Path) -> None:
    output, aside = directory / "output", directory / "replaced"
    _sync_tree(output)
    if dst.exists():
        dst.rename(aside)
    output.rename(dst)
    _sync(dst.absolute().parent)
    if aside.exists():
        _discard(aside)
    shutil.rmtree(directory)


def _leave(dst: Path, directory: Path, stage: Stage | None, error: BaseException) -> str:
    """After an error: keep what is finished where it will be of use, else remove everything. Says what was kept."""
    aside = directory / "replaced"
    if aside.exists() and not dst.exists():
        aside.rename(dst)
    found = read_all(directory)
    usable = found.files and not found.key.endswith(NOT_DURABLE) and (directory / "output").exists()
    with contextlib.suppress(OSError):
        if stage is not None:
            stage.journal.close()
            stage.remove_unfinished(found.files if usable else ())
    if usable and _may_be_mended(error):
        return _kept(found, directory)
    shutil.rmtree(directory, ignore_errors=True)
    return ""


@contextmanager
def interruptible(dst: Path) -> Iterator[None]:
    """Ctrl-C in the block, before or after the work on `dst`, becomes Interrupted, which says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        directory = stage_directory(dst)
        found = read_all(directory)
        raise _interrupted(_kept(found, directory) if found.files else "") from None


def _interrupted(left: str) -> Interrupted:
    hint = CONTINUE if " kept in " in left else "the same command starts from the beginning"
    return Interrupted(f"interrupted; {left or 'nothing was left behind'}", hint=hint)


def _kept(found: Entries, directory: Path) -> str:
    return f"{len(found.files)} finished file{'s' if len(found.files) != 1 else ''} kept in {directory}"


def _may_be_mended(error: BaseException) -> bool:
    if isinstance(error, ShardtoolError):
        return isinstance(error, RankError) or isinstance(error.__cause__, OSError)
    return isinstance(error, OSError | MemoryError) or not isinstance(error, Exception)


def _explained(error: BaseException, dst: Path, directory: Path, kept: str, complete: bool) -> BaseException:
    """The error as the user gets it: what was kept, and how to go on."""
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(kept or (f"{dst} is complete" if complete else ""))
    if isinstance(error, OSError):
        found = _free(dst) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        return refused_by_the_system(error, str(directory), found, f"{CONTINUE}; {kept}" if kept else AGAIN)
    if isinstance(error, ShardtoolError) and kept:
        error.hint = f"{CONTINUE}; {kept}"
    return error


def _free(dst: Path) -> str | None:
    try:
        found = os.statvfs(dst.absolute().parent)
    except OSError:
        return None
    return f"{found.f_bavail * found.f_frsize} bytes free"


class _Lock:
    """The lock of a stage directory, which is made where it is not there. UsageError where another process has it."""

    def __init__(self, directory: Path, say: Say = _quiet) -> None:
        path = directory / "lock"
        while True:
            directory.mkdir(exist_ok=True)
            try:
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the other process has just removed the directory
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
                os.close(self._descriptor)
                raise UsageError(
                    "another process works on this target",
                    where=str(directory),
                    found=holder or None,
                    hint="wait until it is done, or choose another DST",
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(self._descriptor)
                    raise
                say(f"{directory.parent}: this file system has no locks; do not start a second run for this target")
            if _is_at(self._descriptor, path):
                break
            os.close(self._descriptor)  # the one who had it has removed it
        with contextlib.suppress(OSError):  # for the message alone: the disk may be full
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def __enter__(self) -> None:
        """The lock is held from the beginning."""

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_small(path: Path, data: bytes) -> None:
    """Write a small file and sync it."""
    write_made(path, lambda write: write(data))


def write_made(path: Path, make: Callable[[Callable[[bytes], object]], object]) -> tuple[int, str]:
    """Write a file that `make` hands over piece by piece, and sync it: its size and SHA-256."""
    size, digest = 0, hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:

        def write(piece: bytes) -> None:
            nonlocal size
            size += len(piece)
            digest.update(piece)
            file.write(piece)

        make(write)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _sync_tree(directory: Path) -> None:
    for root, _, _ in os.walk(directory):
        _sync(Path(root))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
