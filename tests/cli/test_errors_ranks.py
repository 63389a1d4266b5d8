"""Runs of several processes whose ranks do not find each other: one error in each, and no DST."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from shardtool.execute import ranks
from spoiled import Refused, TinyModel

Environment = Callable[..., int]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Set what a launcher sets; the port that rank 0 would listen at."""

    monkeypatch.setattr(ranks, "FAREWELL", 0.1)  # nobody is there to be waited for

    def start(rank: object, size: object, *, port: bool = True, timeout: str = "1") -> int:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("SHARDTOOL_RANK_TIMEOUT", timeout)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = int(probe.getsockname()[1])
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free))):
            monkeypatch.setenv(name, value) if port else monkeypatch.delenv(name, raising=False)
        return free

    return start


def next_run() -> int:
    """The number of this process's next run, which is in the keys of its store."""
    return int(ranks._RUNS.__reduce__()[1][0])


def agent(port: int, monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store as torchrun's agent hosts it."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return TCPStore("127.0.0.1", port, None, is_master=True, wait_for_workers=False)


def play(port: int, act: Callable[[Any], object]) -> threading.Thread:
    """Another rank of the next run of this process, which does as little as `act`."""
    run = next_run()

    def talk() -> None:
        store = TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=20))
        act(PrefixStore(f"shardtool-{run}", store))

    thread = threading.Thread(target=talk)
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


def test_the_first_rank_is_not_there(
    launched: Environment, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    launched(1, 2)
    refused(1, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("cannot be reached", "127.0.0.1"))


def test_the_other_rank_does_not_come(
    launched: Environment, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    host = agent(launched(0, 2), monkeypatch)
    refused(1, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("rank 1 did not come",))
    del host


def test_the_launcher_ends(
    launched: Environment, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, refused: Refused, tmp_path: Path
) -> None:
    hosts = [agent(launched(1, 2, timeout="20"), monkeypatch)]
    prefix = f"shardtool-{next_run()}"

    def end() -> None:
        PrefixStore(prefix, hosts[0]).get("here-1")
        hosts.clear()

    thread = threading.Thread(target=end)
    thread.start()
    refused(1, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=("does not answer",))
    thread.join()


PLAYED: dict[str, tuple[Callable[[Any], object], str]] = {
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
    other = play(launched(0, 2, timeout="3"), act)
    refused(1, "hf2megatron", tiny_model("llama"), tmp_path / "dst", names=(name,))
    other.join()
