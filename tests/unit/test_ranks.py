"""Several processes, one conversion: the same bytes for any number of ranks, and no success when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from shardtool.errors import UsageError
from shardtool.execute import ranks
from shardtool.execute.ranks import RankError, Ranks, place, shares
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
    body = np.random.default_rng(0).integers(0, 256, skeleton.size - len(head), np.uint8).tobytes()
    (folder / "model.safetensors").write_bytes(head + body)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def start(rank: int, size: int, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    settings = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "SHARDTOOL_RANK_TIMEOUT": "20", **environment}
    command = [sys.executable, "-m", "shardtool", *map(str, arguments)]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    spoken = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, spoken, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
def test_the_bytes_are_the_same_for_any_number_of_ranks(tmp_path, source, fmt):
    arguments = ("hf2megatron", source, tmp_path / "out", *ARGUMENTS, "--format", fmt)
    results = {}
    for size in (1, 2, 3):
        # the others first: rank 0 clears what it finds, and they must not be lost by that
        done = finish([start(rank, size, *arguments) for rank in reversed(range(size))])
        assert [code for code, _, _ in done] == [0] * size, done
        assert all(stdout == "" for _, stdout, _ in done[:-1])
        assert "tensors in" in done[-1][1]
        results[size] = contents(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"out{size}")
    assert results[1] == results[2] == results[3]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out1", "out2", "out3"]  # nothing else is left
    back = ("megatron2hf", tmp_path / "out3", tmp_path / "back", "--max-shard-size", "20kB", "-q")
    assert [code for code, _, _ in finish([start(rank, 2, *back) for rank in range(2)])] == [0, 0]
    again = safetensors_files.read_checkpoint(tmp_path / "back")
    for name, item in safetensors_files.read_checkpoint(source).items():
        copy = again[name]
        ours, theirs = (Path(at.file).read_bytes()[at.offset : at.offset + at.nbytes] for at in (item, copy))
        assert ours == theirs, name


def test_the_sums_are_those_of_one_process(tmp_path, source):
    arguments = ("hf2megatron", source, tmp_path / "out", *ARGUMENTS, "--json", "--overwrite")
    one = json.loads(finish([start(0, 1, *arguments)])[0][1])
    three = json.loads(finish([start(rank, 3, *arguments) for rank in range(3)])[0][1])
    for name in ("bytes_written", "tensors", "files", "plan_digest", "replicas_compared"):
        assert one[name] == three[name]
    assert (one["processes"], three["processes"]) == (1, 3)


def test_a_rank_that_fails_fails_the_run_with_its_message(tmp_path, source):
    """One rank sees a source that is cut short behind its headers: its payload ends early."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    arguments = ("hf2megatron", broken, tmp_path / "out", *ARGUMENTS, "--format", "torch")
    first = start(0, 2, *arguments)
    script = (
        "import sys; from shardtool.execute import engine; from shardtool.errors import CheckpointError\n"
        "def fail(*_, **__): raise CheckpointError('the cable is out')\n"
        "engine.write = fail\n"
        "from shardtool.cli.main import run; run(sys.argv[1:])"
    )
    settings = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "SHARDTOOL_RANK_TIMEOUT": "20"}
    second = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], env=settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    (code, _, text), (other, _, own) = finish([first, second])
    assert (code, other) == (1, 1)
    assert "rank 1 failed: the cable is out" in text
    assert "the cable is out" in own
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["broken"]


def test_a_rank_that_is_killed_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT", 0.05)
    environment = {"RANK": "0", "WORLD_SIZE": "2", "SHARDTOOL_RANK_TIMEOUT": "1"}
    script = (
        "import os, signal, sys; from pathlib import Path; from shardtool.execute.ranks import Ranks\n"
        "with Ranks(Path(sys.argv[1]), 'd') as team: team.begin(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out"], env={**os.environ, **environment, "RANK": "1"}
    )
    with pytest.raises(RankError, match="rank 1 is silent"), Ranks(tmp_path / "out", "d", environment) as team:
        team.begin("stage")
        team.gather({})
    assert other.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_do_not_come(tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "3", "SHARDTOOL_RANK_TIMEOUT": "0.2"}
    with pytest.raises(RankError, match="did not come: 1, 2"), Ranks(tmp_path / "out", "d", environment) as team:
        team.begin("stage")
    with (
        pytest.raises(RankError, match="rank 0 did not come"),
        Ranks(tmp_path / "out", "d", {**environment, "RANK": "2"}) as team,
    ):
        team.begin()
    assert list(tmp_path.iterdir()) == []


def together(tmp_path: Path, digests: tuple[str, ...], then) -> list[object]:
    """The ranks as threads of this process; what `then(team)` returns or raises in each."""
    found: list[object] = [None] * len(digests)
    environment = {"WORLD_SIZE": str(len(digests)), "SHARDTOOL_RANK_TIMEOUT": "20"}

    def one(rank: int) -> None:
        try:
            with Ranks(tmp_path / "out", digests[rank], {**environment, "RANK": str(rank)}) as team:
                stage = team.begin("stage" if rank == 0 else "")
                assert stage == "stage"
                found[rank] = then(team)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(digests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_other_plans_are_refused(tmp_path):
    errors = together(tmp_path, ("a", "b"), id)
    assert [str(error).splitlines()[0] for error in errors] == [
        "rank 1 has made another plan than rank 0",
        "rank 0 failed: rank 1 has made another plan than rank 0",
    ]


def test_an_error_reaches_the_other_ranks_while_they_work(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT", 0.02)

    def work(team: Ranks) -> None:
        if team.rank == 2:
            raise ValueError("no")
        until = time.monotonic() + 20
        while time.monotonic() < until:
            team.check()
            time.sleep(0.01)

    errors = together(tmp_path, ("a", "a", "a"), work)
    assert [str(error) for error in errors] == ["rank 2 failed: ValueError: no"] * 2 + ["no"]
    assert list(tmp_path.iterdir()) == []


def test_progress_of_other_ranks_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT", 0.02)
    seen: list[int] = []

    def work(team: Ranks) -> dict[str, int]:
        team.on_progress = seen.append if team.first else None
        team.written = 5 * team.rank
        if not team.first:
            time.sleep(0.3)
            team.report({"written": team.written})
            return {}
        total = team.gather({"written": 1})
        team.end()
        return total

    assert together(tmp_path, ("a", "a", "a"), work)[0] == {"written": 16}
    assert sum(seen) == 15


def test_what_a_killed_run_left_is_not_taken_for_new(tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "SHARDTOOL_RANK_TIMEOUT": "20"}
    folder = Ranks(tmp_path / "out", "a", environment)._directory
    folder.mkdir()
    for name in ("here-1", "go", "done-1", "failed-1", "end"):
        old = {"nonce": "old", "nonces": ["old", "old"], "stage": "old", "digest": "old", "counter": 1, "written": 9}
        (folder / name).write_text(json.dumps({**old, "result": {"written": 9}, "what": "old"}))

    def work(team: Ranks) -> int:
        if team.first:
            total = team.gather({"written": 1})
            team.end()
            return total["written"]
        team.report({"written": 2})
        return 0

    assert together(tmp_path, ("a", "a"), work) == [3, 0]


def test_a_terminated_rank_cleans_up(tmp_path, source):
    process = start(0, 2, "hf2megatron", source, tmp_path / "out", *ARGUMENTS)
    until = time.monotonic() + 20
    while time.monotonic() < until and len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("0", "0"), ("x", "2"), ("1", None)])
def test_places_that_make_no_sense(rank, size):
    with pytest.raises(UsageError, match="make no sense"):
        place({"RANK": rank} | ({"WORLD_SIZE": size} if size else {}))


def test_places():
    assert place({}) == (0, 1)
    assert place({"RANK": "3", "WORLD_SIZE": "4"}) == (3, 4)


def test_shares_are_balanced_and_keep_neighbours_together():
    files = [(f"f{number}", 10 + number % 3) for number in range(16)]
    found = shares(files, 4)
    assert list(found.values()) == sorted(found.values())
    loads = [sum(size for name, size in files if found[name] == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= 12
    assert shares([("a", 0), ("b", 0)], 2) == {"a": 0, "b": 0}
    assert shares([("a", 5)], 3) == {"a": 1}
