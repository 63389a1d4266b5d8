"""Several processes, one conversion: the same bytes for any number of ranks, and no success when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import TCPStore

from shardtool.errors import UsageError
from shardtool.execute import ranks
from shardtool.execute.launcher import cores, neighbours, place
from shardtool.execute.local_store import Guest, Host
from shardtool.execute.ranks import Polled, RankError, Ranks, shares
from shardtool.families.blocks import axis_sizes
from shardtool.families.registry import family_of
from shardtool.formats import safetensors_files
from shardtool.layout.huggingface import huggingface_layout

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
ARGUMENTS = ("--tp", "2", "--pp", "2", "--vocab-divisible-by", "16", "-q")
# one rank's engine waits until it is killed, or fails
FAULTY = """
import os, signal, sys
from shardtool.errors import CheckpointError
from shardtool.execute import engine
def fail(*_, **__):
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise CheckpointError("the cable is out", hint="plug it in")
if os.environ["RANK"] == "1":
    engine.write = fail
from shardtool.cli.main import run
run(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "hf"
    folder.mkdir()
    family = family_of(CONFIG)
    a = family.read_config(CONFIG)
    layout = huggingface_layout(family.rules(a), axis_sizes(a))
    tensors = [(key[1], layout.shape(piece), "bfloat16") for key, piece in layout.tensors()]
    skeleton = safetensors_files.skeleton(tensors)
    head = skeleton.parts[0][1]
    numbers = np.random.default_rng(0).integers(0, 1 << 16, (skeleton.size - len(head)) // 2, np.uint16)
    body = (numbers & 0xFF7F).tobytes()  # never all ones in the exponent: neither NaN nor Inf
    (folder / "model.safetensors").write_bytes(head + body)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def torchrun(size: int, *command: object, store: str = "local") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "SHARDTOOL_RANK_TIMEOUT": "30", "SHARDTOOL_STORE": store}
    given = [*launcher, *map(str, command)]
    return subprocess.run(given, env=settings, capture_output=True, text=True, timeout=120, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_steps(
    size: int, command: list[object], timeout: str = "30", **settings: object
) -> list[subprocess.Popen[str]]:
    """Processes as srun starts them on one node, in a job of their own."""
    launchers = ("RANK", "WORLD", "LOCAL_WORLD", "TORCHELASTIC", "MASTER", "SLURM")
    base = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    base |= {"SLURM_JOB_ID": uuid.uuid4().hex, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1"}
    base |= {"SLURM_NTASKS": str(size), "OMP_NUM_THREADS": "1", "SHARDTOOL_RANK_TIMEOUT": timeout}
    base |= {name: str(value) for name, value in settings.items()}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**base, "SLURM_PROCID": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]


def steps_with_torch(command: list[object]) -> list[tuple[int, str, str]]:
    """Two, whose rank 0 hosts torch's store: at a port that was free a moment ago, so that it may have to be another."""
    for _ in range(3):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SHARDTOOL_STORE": "torch"}
        done = finish(start_steps(2, command, **address))
        if "store cannot be reached" not in done[0][2]:
            break
    return done


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    spoken = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, spoken, strict=True)]


def test_the_bytes_are_the_same_for_any_number_of_ranks(tmp_path, source):
    """One process, torchrun with 3, and 2 steps of srun with torch's store, there and back."""
    command = ("-m", "shardtool", "hf2megatron", source)
    one = subprocess.run(
        [sys.executable, *map(str, command), tmp_path / "one", *ARGUMENTS, "--json"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    three = torchrun(3, *command, tmp_path / "three", *ARGUMENTS, "--json")
    assert three.returncode == 0, three.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    ours, theirs = json.loads(one.stdout), json.loads(three.stdout)  # rank 0 alone has printed
    for name in ("bytes_written", "tensors", "files", "plan_digest", "replicas_compared"):
        assert ours[name] == theirs[name]
    assert (ours["processes"], theirs["processes"]) == (1, 3)
    back = ["-m", "shardtool", "megatron2hf", tmp_path / "three", tmp_path / "back", "--max-shard-size", "20kB", "-q"]
    (first, out, text), (second, nothing, _) = steps_with_torch(back)
    assert (first, second, nothing) == (0, 0, ""), text
    assert "tensors in" in out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["back", "one", "three"]  # nothing else is left
    again = safetensors_files.read_checkpoint(tmp_path / "back")
    for name, item in safetensors_files.read_checkpoint(source).items():
        copy = again[name]
        held, made = (Path(at.file).read_bytes()[at.offset : at.offset + at.nbytes] for at in (item, copy))
        assert held == made, name


def check_the_next_run(tmp_path: Path, source: Path, *options: str) -> None:
    """There is no DST; one process takes up what the ranks have finished, and gives the bytes of an undisturbed run."""
    assert {entry.name for entry in tmp_path.iterdir()} <= {"faulty.py", ".out.shardtool"}
    kept = sum(path.read_text().count('{"file":') for path in tmp_path.glob(".out.shardtool/journal-*.jsonl"))
    for name in ("out", "undisturbed"):
        command = [sys.executable, "-m", "shardtool", "hf2megatron", source, tmp_path / name, *ARGUMENTS[:-1], *options]
        run = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        assert ("continuing: " in run.stderr) == (kept > 0 and name == "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not (tmp_path / ".out.shardtool").exists()


def test_a_rank_that_fails_fails_the_run_with_its_message(tmp_path, source):
    (tmp_path / "faulty.py").write_text(FAULTY)
    command = (tmp_path / "faulty.py", "fail", "hf2megatron", source, tmp_path / "out", *ARGUMENTS, "--format", "torch")
    done = torchrun(2, *command, store="torch")
    assert done.returncode != 0
    assert "error: the cable is out" in done.stderr  # rank 1
    assert "error: rank 1 failed: the cable is out" in done.stderr  # rank 0
    check_the_next_run(tmp_path, source, "--format", "torch")


def test_a_rank_that_is_killed_fails_the_run(tmp_path, source):
    (tmp_path / "faulty.py").write_text(FAULTY.replace('environ["RANK"]', 'environ["SLURM_PROCID"]'))
    command = [tmp_path / "faulty.py", "kill", "hf2megatron", source, tmp_path / "out", *ARGUMENTS]
    (first, _, text), (second, _, _) = finish(start_steps(2, command, timeout="3"))
    assert (first, second) == (1, -signal.SIGKILL)
    assert "rank 1 is silent" in text
    check_the_next_run(tmp_path, source)


def test_a_killed_rank_under_torchrun(tmp_path, source):
    """torchrun ends the others with SIGTERM."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    done = torchrun(2, tmp_path / "faulty.py", "kill", "hf2megatron", source, tmp_path / "out", *ARGUMENTS)
    assert done.returncode != 0
    check_the_next_run(tmp_path, source)


# --- the ranks as threads of this process, each with a client of its own ------------------------------------------------


@pytest.fixture
def stores(request, tmp_path_factory):
    """A store for each rank: their number, and "torch" for those of torch."""
    size, kind = request.param if isinstance(request.param, tuple) else (request.param, "local")
    if kind == "torch":
        wait = timedelta(seconds=20)
        host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
        yield [Polled(TCPStore("127.0.0.1", host.port, is_master=False, timeout=wait)) for _ in range(size)]
        return
    path = tmp_path_factory.mktemp("s") / "socket"
    host = Host(path)
    yield [host, *(Guest(path, rank, 20) for rank in range(1, size))]
    host.close()


def together(clients, then, timeout: float = 20, missing: tuple[int, ...] = ()) -> list[object]:
    """What `then(team)` returns or raises in each rank."""
    found: list[object] = [None] * len(clients)

    def one(rank: int) -> None:
        environment = {"RANK": str(rank), "WORLD_SIZE": str(len(clients)), "SHARDTOOL_RANK_TIMEOUT": str(timeout)}
        try:
            with Ranks(environment, clients[rank]) as team:
                found[rank] = then(team)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(clients)) if rank not in missing]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ranks, "BEAT", 0.02)
    monkeypatch.setattr(ranks, "POLL", 0.002)


def work(team: Ranks) -> dict[str, int]:
    """A run of nothing."""
    assert team.begin("digest", "stage" if team.first else "") == "stage"
    if not team.first:
        team.report({"written": team.rank})
        return {}
    total = team.gather({"written": 10})
    team.end()
    return total


@pytest.mark.parametrize("stores", [2, 5, (2, "torch"), (5, "torch")], indirect=True)
def test_results_are_summed(stores):
    size = len(stores)
    assert together(stores, work) == [{"written": 10 + sum(range(size))}, *[{}] * (size - 1)]


def test_two_runs_with_the_store_of_one_agent(monkeypatch):
    """Two commands in one job of torchrun: the second does not see what the first has left there."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in address.items():
        monkeypatch.setenv(name, value)  # torch reads them there
    for _ in range(2):
        clients = [ranks._torch_store(rank, 2, 20, os.environ) for rank in range(2)]
        assert not clients[0].check(["go"])
        assert together(clients, work) == [{"written": 11}, {}]


@pytest.mark.parametrize("stores", [2], indirect=True)
def test_other_plans_are_refused(stores):
    errors = together(stores, lambda team: team.begin(f"plan {team.rank}", "stage"))
    assert [str(error).splitlines()[0] for error in errors] == ["rank 1 has made another plan than rank 0"] * 2


@pytest.mark.parametrize("stores", [3, (3, "torch")], indirect=True)
def test_an_error_reaches_the_other_ranks_while_they_work(stores):
    def fail(team: Ranks) -> None:
        team.begin("digest", "stage")
        if team.rank == 2:
            raise ValueError("no")
        until = time.monotonic() + 20
        while time.monotonic() < until:
            team.check()
            time.sleep(0.005)

    errors = together(stores, fail)
    assert [getattr(error, "what", str(error)) for error in errors] == ["rank 2 failed: ValueError: no"] * 2 + ["no"]


@pytest.mark.parametrize("stores", [3], indirect=True)
def test_an_error_of_the_first_rank_after_all_shares_are_written(stores):
    """It commits last, and that may fail."""

    def fail(team: Ranks) -> None:
        team.begin("digest", "stage")
        if not team.first:
            team.report({"written": 1})
            return
        team.gather({"written": 1})
        raise OSError("the disk is full")

    errors = together(stores, fail)
    assert [getattr(error, "what", str(error)) for error in errors[1:]] == [
        "rank 0 failed: OSError: the disk is full"
    ] * 2


@pytest.mark.parametrize("stores", [3, (3, "torch")], indirect=True)
@pytest.mark.parametrize("missing", [0, 2])
def test_ranks_that_do_not_come(stores, missing, monkeypatch):
    monkeypatch.setattr(ranks, "FAREWELL", 0.1)
    found = together(stores, work, timeout=0.3, missing=(missing,))
    assert {type(error) for rank, error in enumerate(found) if rank != missing} == {RankError}
    assert {str(error).splitlines()[0] for error in found if error} == {f"rank {missing} did not come"}


@pytest.mark.parametrize("stores", [3], indirect=True)
def test_progress_of_other_ranks_is_seen(stores):
    seen: list[int] = []

    def progress(team: Ranks) -> None:
        team.on_progress = seen.append if team.first else None
        team.begin("digest", "stage")
        team.written = 5 * team.rank
        until = time.monotonic() + 20
        while sum(seen) < 15 and time.monotonic() < until:
            time.sleep(0.005)

    assert together(stores, progress) == [None] * 3
    assert sum(seen) == 15


@pytest.mark.parametrize("kind", ["local", "torch"])
def test_a_store_that_is_gone(kind, tmp_path_factory):
    if kind == "torch":
        host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        client = Polled(TCPStore("127.0.0.1", host.port, is_master=False))
        del host
    else:
        path = tmp_path_factory.mktemp("s") / "socket"
        host = Host(path)
        client = Guest(path, 1, 20)
        host.close()
    with (
        pytest.raises(RankError, match="store does not answer"),
        Ranks({"RANK": "1", "WORLD_SIZE": "2", "SHARDTOOL_RANK_TIMEOUT": "5"}, client) as team,
    ):
        team.begin("digest")


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("0", "0"), ("x", "2"), ("1", None)])
def test_places_that_make_no_sense(rank, size):
    with pytest.raises(UsageError, match="make no sense"):
        place({"RANK": rank} | ({"WORLD_SIZE": size} if size else {}))


def test_places():
    assert place({}) == (0, 1)
    assert place({"RANK": "3", "WORLD_SIZE": "4"}) == (3, 4)
    assert place({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}) == (3, 4)
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == (0, 1)  # the script of sbatch: nothing is started yet
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
    assert place({"RANK": "1", "WORLD_SIZE": "2", **slurm}) == (1, 2)  # torchrun in a step of srun


SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 0),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, 2),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, 4),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1"}, 0),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "2"}, 4),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "::1"}, 2),
        ({**SRUN, "SLURM_JOB_NUM_NODES": "3"}, 2),
        (SRUN, 0),
        ({**SRUN, "MASTER_ADDR": "localhost"}, 4),
        ({**SRUN, "SLURM_NNODES": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, 1),
    ],
)
def test_how_many_ranks_a_node_has(environment, number):
    assert neighbours(environment) == number


def test_ranks_share_the_cores_of_their_node():
    mine, node = len(os.sched_getaffinity(0)), os.cpu_count()
    assert cores({}) == min(mine, node)
    assert cores({"RANK": "1", "WORLD_SIZE": "999", "MASTER_ADDR": "localhost"}) == 1
    assert cores({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}) == max(1, min(mine, node // 2))
    assert cores({**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "4"}) == 1


def test_an_address_is_needed():
    held = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UsageError, match="MASTER_ADDR and MASTER_PORT"), Ranks({"RANK": "1", "WORLD_SIZE": "2"}):
        pass
    assert signal.getsignal(signal.SIGTERM) == held


def test_shares_are_balanced_and_keep_neighbours_together():
    files = [(f"f{number}", 10 + number % 3) for number in range(16)]
    found = shares(files, 4)
    assert list(found.values()) == sorted(found.values())
    loads = [sum(size for name, size in files if found[name] == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= 12
    assert shares([("a", 0), ("b", 0)], 2) == {"a": 0, "b": 0}
    assert shares([("a", 5)], 3) == {"a": 1}
