"""The store of ranks on one node: as TCPStore where `Ranks` relies on it, and safe against the dead and the early."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from torch.distributed import TCPStore

from shardtool.errors import UsageError
from shardtool.execute.local_store import Guest, Host
from shardtool.execute.meeting import socket_path
from shardtool.execute.ranks import Polled

ENDED = -signal.SIGKILL
# a rank of a job: what it does before rank 0 stops listening, or instead of writing, is in its arguments
PROGRAM = """
import os, signal, sys, time
from shardtool.cli.main import run
from shardtool.execute import engine, local_store
rank, what = os.environ["RANK"], sys.argv[1]
write, close = engine.write, local_store.Host.close
def disturbed(*arguments, **options):
    if what == "kill 0" and rank == "0":
        time.sleep(0.2)  # the others have come
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "terminate 0":
        if rank == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # rank 0 is gone by then
    return write(*arguments, **options)
def late(host):
    time.sleep(0.5)
    close(host)
engine.write = disturbed
if what == "leave late":
    local_store.Host.close = late
for dst in sys.argv[3:]:
    try:
        run(["hf2megatron", sys.argv[2], dst, "--tp", "2", "-q"])
    except SystemExit as stop:
        if stop.code:
            raise
if "torch" in sys.modules:
    sys.exit("torch was imported")
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, as that of a socket has to be, for the sockets of this test."""
    directory = Path(tempfile.mkdtemp(prefix="s"))
    yield directory
    shutil.rmtree(directory)


def environment(place: Path, **more: str) -> dict[str, str]:
    """Of a job of two on one node."""
    return {
        "TMPDIR": str(place), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "12345", "TORCHELASTIC_RUN_ID": uuid.uuid4().hex, "SHARDTOOL_RANK_TIMEOUT": "30", **more,
    }  # fmt: skip


def start(job: dict[str, str], *arguments: object) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], env={**os.environ, **job, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- as TCPStore -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["host", "guest", "torch"])
def test_the_same_answers_as_from_torch(kind: str, place: Path) -> None:
    host = Host(place / "socket")
    torch = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = {"host": host, "guest": Guest(place / "socket", 1, 20), "torch": Polled(torch)}[kind]
    store.set("key", "a line\nand \N{SNOWMAN}")
    assert store.get("key") == "a line\nand \N{SNOWMAN}".encode()
    assert store.check(["key"])
    assert not store.check(["key", "other"])
    assert [store.add("counter", number) for number in (0, 1, 2, 0)] == [0, 1, 3, 3]
    assert store.get("counter") == b"3"
    assert store.compare_set("first", "", "one") == b"one"
    assert store.compare_set("first", "", "two") == b"one"
    assert store.compare_set("first", "one", "three") == store.get("first") == b"three"
    assert not store.wait("other", 0.01)
    threading.Timer(0.05, lambda: store.set("other", "")).start()
    assert store.wait("other", 20)
    assert store.get("other") == b""
    store.close()
    host.close()


def test_what_is_not_set(place: Path) -> None:
    host = Host(place / "socket")
    guest = Guest(place / "socket", 1, 20)
    for store in (host, guest):
        with pytest.raises(RuntimeError, match="nothing is not set"):
            store.get("nothing")
    with pytest.raises(RuntimeError, match="the store has no close"):
        guest._ask("close")
    assert not guest.check(["nothing"])  # the connection goes on
    host.close()


def test_a_path_that_is_no_unicode(place: Path) -> None:
    """rank 0 sends the others where the stage is."""
    host = Host(place / "socket")
    name = os.fsdecode(b"caf\xe9")
    host.set("go", name)
    assert os.fsdecode(Guest(place / "socket", 1, 20).get("go")) == name
    host.close()


def test_many_threads_of_many_ranks(place: Path) -> None:
    host = Host(place / "socket")
    guests = [Guest(place / "socket", rank, 20) for rank in range(1, 9)]
    threads = [
        threading.Thread(target=lambda guest=guest: [guest.add("sum", 1) for _ in range(50)])
        for guest in (*guests, *guests, host)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host.add("sum", 0) == 17 * 50
    host.close()


def test_a_question_that_is_torn_away_does_not_shift_the_answers(place: Path) -> None:
    """SIGTERM in the middle of a wait: what is asked after it gets its own answer."""

    def tear(_: int, __: FrameType | None) -> None:
        raise InterruptedError("torn")

    host = Host(place / "socket")
    guest = Guest(place / "socket", 1, 20)
    held = signal.signal(signal.SIGALRM, tear)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(InterruptedError):
            guest.wait("never", 0.3)
    finally:
        signal.signal(signal.SIGALRM, held)
    guest.set("key", "value")
    assert guest.get("key") == b"value"
    host.close()


# --- the dead, the early, the others -----------------------------------------------------------------------------------


def test_who_has_been_there_waits_for_the_next_run(place: Path) -> None:
    """A rank of the next run is early: it must neither speak to the last run's rank 0 nor give up."""
    path = place / "socket"
    first = Host(path)
    leaving = Guest(path, 1, 20)
    leaving.set("key", "of the first run")
    found: list[Guest] = []
    early = threading.Thread(target=lambda: found.append(Guest(path, 1, 20)))
    early.start()
    time.sleep(0.1)
    assert not found
    first.close()
    second = Host(path)
    early.join()
    assert not found[0].check(["key"])
    leaving.close()  # one that lost its connection must not end up in the second run either
    with pytest.raises(ConnectionRefusedError, match="another run"):
        leaving.check(["key"])
    found[0].set("key", "of the second run")
    assert second.get("key") == b"of the second run"
    second.close()
    assert list(place.iterdir()) == []


def test_sockets_of_the_dead_are_cleared_away(place: Path) -> None:
    """Also those of other jobs, and not the living ones."""
    for name in ("dead.sock", "mine.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(place / name))
    alive = Host(place / "alive.sock")
    mine = Host(place / "mine.sock")
    assert sorted(path.name for path in place.iterdir()) == ["alive.sock", "mine.sock"]
    with pytest.raises(UsageError, match="under way") as refused:
        Host(place / "mine.sock")
    assert f"process {os.getpid()} on " in str(refused.value)
    assert Guest(place / "mine.sock", 1, 20).check([])
    for host in (alive, mine):
        host.close()
    assert list(place.iterdir()) == []


def test_the_socket_is_for_this_user_alone(place: Path) -> None:
    path = socket_path({"TMPDIR": str(place)})
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path != socket_path({"TMPDIR": str(place), "MASTER_PORT": "1"})
    path.parent.chmod(0o770)
    with pytest.raises(UsageError, match="not safe"):
        socket_path({"TMPDIR": str(place)})
    path.parent.rmdir()
    path.parent.symlink_to(place)
    with pytest.raises(UsageError, match="no directory"):
        socket_path({"TMPDIR": str(place)})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that belongs to another user")
def test_another_user_has_made_the_directory(place: Path) -> None:
    directory = socket_path({"TMPDIR": str(place)}).parent
    os.chown(directory, 12345, -1)
    with pytest.raises(UsageError, match="user 12345, mode 700"):
        socket_path({"TMPDIR": str(place)})


def test_two_conversions_in_each_process(tiny_model, place: Path, tmp_path: Path) -> None:
    """And torch is not imported."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = (tmp_path / "program.py", "nothing", tiny_model("llama"), tmp_path / "a", tmp_path / "b")
    assert finish(start(environment(place), *command)) == [(0, ""), (0, "")]
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != {}
    assert list(place.rglob("*.sock")) == []


def test_two_commands_in_one_job(tiny_model, place: Path, tmp_path: Path) -> None:
    """The second begins in rank 1 while the first one's rank 0 still listens."""
    (tmp_path / "program.py").write_text(PROGRAM)
    two = "import subprocess, sys\nfor dst in sys.argv[2:]: subprocess.run([*eval(sys.argv[1]), dst], check=True)"
    command = [sys.executable, str(tmp_path / "program.py"), "leave late", str(tiny_model("llama"))]
    job = start(environment(place), "-c", two, repr(command), tmp_path / "a", tmp_path / "b")
    assert finish(job) == [(0, ""), (0, "")]
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != {}


def test_two_jobs_at_once(tiny_model, place: Path, tmp_path: Path) -> None:
    """Of one user on one node, whose ports differ."""
    jobs = [
        start(environment(place, MASTER_PORT=port), "-m", "shardtool", "hf2megatron", tiny_model("llama"),
              tmp_path / port, "--tp", 2, "-q")
        for port in ("11111", "22222")
    ]  # fmt: skip
    assert [code for job in jobs for code, _ in finish(job)] == [0, 0, 0, 0]
    assert contents(tmp_path / "11111") == contents(tmp_path / "22222") != {}


@pytest.mark.parametrize("how", ["kill 0", "terminate 0"])
def test_rank_0_ends(how: str, tiny_model, place: Path, tmp_path: Path) -> None:
    """The other rank fails at once, and the same job can be started again."""
    (tmp_path / "program.py").write_text(PROGRAM)
    job = environment(place, SHARDTOOL_RANK_TIMEOUT="3" if how == "kill 0" else "30")
    command = (tmp_path / "program.py", how, tiny_model("llama"), tmp_path / "dst")
    (first, _), (second, text) = finish(start(job, *command))
    assert second != 0
    if how == "kill 0":
        assert first == ENDED
        assert "the job's store does not answer" in text or "rank 0 is silent" in text
        assert len(list(place.rglob("*.sock"))) == 1
    else:
        assert first == 128 + signal.SIGTERM
        assert "rank 0 failed: SystemExit" in text
        assert list(place.rglob("*.sock")) == []
    assert not (tmp_path / "dst").exists()
    again = (tmp_path / "program.py", "nothing", tiny_model("llama"), tmp_path / "dst")
    assert finish(start(job, *again)) == [(0, ""), (0, "")]
    assert list(place.rglob("*.sock")) == []
