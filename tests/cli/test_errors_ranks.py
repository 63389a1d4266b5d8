"""Runs of several processes whose ranks do not find each other: one error in each, and no DST."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, TCPStore

from shardtool.execute import ranks
from shardtool.execute.local_store import Guest, Host
from shardtool.execute.meeting import socket_path
from spoiled import Refused, TinyModel

Environment = Callable[..., int]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Set what a launcher sets for ranks on one node, in a job of their own; the port that torch would listen at."""

    monkeypatch.setattr(ranks, "FAREWELL", 0.1)  # nobody is there to be waited for

    def start(rank: object, size: object, *, port: bool = True, timeout: str = "1") -> int:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", uuid.uuid4().hex)
        monkeypatch.setenv("SHARDTOOL_RANK_TIMEOUT", timeout)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = int(probe.getsockname()[1])
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free))):
            monkeypatch.setenv(name, value) if port else monkeypatch.delenv(name, raising=False)
        return free

    return start


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="s"))
    yield directory
    shutil.rmtree(directory)


def play(act: Callable[[Guest], object]) -> threading.Thread:
    """The other rank of the next run, which does as little as `act`."""
    thread = threading.Thread(target=lambda: act(Guest(socket_path(), 1, 20)))
    thread.start()
    return thread


def test_a_rank_beyond_their_number(
    launched: Environment, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    launched(5, 2)
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("RANK=5", "WORLD_SIZE=2"))


def test_several_ranks_without_an_address(
    launched: Environment, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    launched(0, 2, port=False)
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("MASTER_ADDR", "MASTER_PORT"))


def test_an_unknown_store(
    launched: Environment, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    launched(0, 2)
    monkeypatch.setenv("SHARDTOOL_STORE", "redis")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("SHARDTOOL_STORE", "redis", "local, torch"))


NOT_THERE = {"local": ("rank 0 is not there", "container"), "torch": ("cannot be reached", "127.0.0.1")}


@pytest.mark.parametrize("case", NOT_THERE)
def test_the_first_rank_is_not_there(
    case: str, launched: Environment, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, refused: Refused,
    tmp_path: Path,
) -> None:  # fmt: skip
    launched(1, 2)
    monkeypatch.setenv("SHARDTOOL_STORE", case)
    refused(1, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=NOT_THERE[case])


def test_the_other_rank_does_not_come(
    launched: Environment, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    launched(0, 2)
    refused(1, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("rank 1 did not come",))


def test_another_run_of_the_job_is_under_way(
    launched: Environment, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    launched(0, 2)
    host = Host(socket_path())
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("process ", "MASTER_PORT"))
    host.close()


def test_others_can_write_where_the_ranks_meet(
    launched: Environment, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, refused: Refused, tmp_path: Path,
    short: Path,
) -> None:  # fmt: skip
    launched(0, 2)
    monkeypatch.setenv("TMPDIR", str(short))
    socket_path().parent.chmod(0o777)
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("not safe", "mode 777"))


def test_the_ranks_have_no_place_to_meet_in(
    launched: Environment, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, refused: Refused, tmp_path: Path,
    short: Path,
) -> None:  # fmt: skip
    launched(0, 2)
    monkeypatch.setenv("TMPDIR", str(short))
    (short / f"shardtool-{os.getuid()}").write_text("a file")
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("cannot be made", "File exists"))


def test_a_tmpdir_that_is_too_long_for_a_socket(
    launched: Environment, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, refused: Refused, tmp_path: Path,
    short: Path,
) -> None:  # fmt: skip
    launched(0, 2)
    (short / ("long" * 30)).mkdir()
    monkeypatch.setenv("TMPDIR", str(short / ("long" * 30)))
    refused(2, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("too long", "TMPDIR"))


def test_the_first_rank_ends(launched: Environment, tiny_model: TinyModel, refused: Refused, tmp_path: Path) -> None:
    launched(1, 2, timeout="20")
    model = tiny_model("llama")  # which takes long the first time

    def end() -> None:
        host.wait("here-1", 20)
        host.close()

    host = Host(socket_path())
    thread = threading.Thread(target=end)
    thread.start()
    refused(1, "hf2megatron", model, tmp_path / "dst", names=("does not answer",))
    thread.join()


def test_the_launcher_ends(
    launched: Environment, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    """It hosts torch's store."""
    port = launched(1, 2, timeout="20")
    monkeypatch.setenv("SHARDTOOL_STORE", "torch")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    hosts = [TCPStore("127.0.0.1", port, None, is_master=True, wait_for_workers=False)]

    def end() -> None:
        PrefixStore("shardtool-1", hosts[0]).get("here-1")
        hosts.clear()

    thread = threading.Thread(target=end)
    thread.start()
    refused(1, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("does not answer",))
    thread.join()


PLAYED: dict[str, tuple[Callable[[Guest], object], str]] = {
    "makes another plan": (
        lambda s: (s.set("written-1", "0"), s.add("beat-1", 1), s.set("here-1", "another")),
        "another plan",
    ),
    "fails": (lambda s: s.set("failed", "rank 1 failed: a file cannot be read"), "rank 1 failed"),
    "falls silent": (lambda s: (s.set("written-1", "0"), s.add("beat-1", 1)), "rank 1 is silent"),
}


@pytest.mark.parametrize("case", PLAYED)
def test_the_other_rank(
    case: str, launched: Environment, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    act, name = PLAYED[case]
    launched(0, 2, timeout="3")
    model = tiny_model("llama")  # which takes long the first time
    other = play(act)
    refused(1, "hf2megatron", model, tmp_path / "dst", names=(name,))
    other.join()
