"""Many broken checkpoints, one after the other, and the count of what became of them."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing import oracle, seeds
from fuzzing.mutations import CANARY, mutate

SECONDS = 10.0
MEMORY = 1 << 30
TESTS = Path(__file__).parents[1]


@dataclass
class Counts:
    """What became of the runs, and those that must not be."""

    runs: int = 0
    refused: int = 0
    accepted: int = 0
    unreadable: int = 0  # accepted, and refused by the independent reader: the same output as of the unbroken one
    by_reader: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)  # errors that do not name the broken file
    slowest: float = 0.0
    peak: int = 0

    def lines(self) -> list[str]:
        """For people."""
        kinds = Counter(finding["what"] for finding in self.findings)
        readers = ", ".join(f"{name} {count}" for name, count in sorted(self.by_reader.items()))
        return [
            f"{self.runs} broken inputs: {readers}",
            f"{self.refused} refused with one error, {self.accepted} read as the independent reader reads them, "
            f"{self.unreadable} read as before though the independent reader refuses them",
            f"slowest run {self.slowest:.1f} s, largest resident memory {self.peak >> 20} MiB",
            *(f"FOUND {count} x {what}" for what, count in kinds.most_common()),
            "nothing found" if not self.findings else f"{len(self.findings)} findings",
        ]


class Worker:
    """The process that runs commands; started again when it had to be killed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, arguments: list[str], directory: Path) -> dict[str, Any]:
        """The result of a command; `hang` or `died` in it where there is none."""
        grace = 0.0
        if self.process is None or self.process.poll() is not None:
            grace = 30.0  # starting takes its time, too
            environment = {**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fuzzing.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment,
            )  # fmt: skip
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        begin = time.monotonic()
        process.stdin.write(json.dumps({"arguments": arguments, "directory": str(directory)}) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS + grace)
        line = process.stdout.readline() if ready else ""
        seconds = time.monotonic() - begin
        if not line:
            self.close()
            return {
                "code": -1,
                "err": "",
                "seen": [],
                "peak": 0,
                "seconds": seconds,
                "gone": "hang" if not ready else "died",
            }
        return {**json.loads(line), "seconds": seconds, "gone": ""}

    def close(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def campaign(
    root: Path, readers: tuple[str, ...], *, count: int | None, seconds: float | None = None, first: int = 0
) -> Iterator[Counts]:
    """Break and read until `count` runs or `seconds` are over; yields the counts after each run. Run n is the same
    whenever the seeds are."""
    every = seeds.build(root / "seeds")
    chosen = [seed for seed in every if seed.reader in readers]
    worker, counts = Worker(), Counts()
    baselines: dict[tuple[str, tuple[str, ...]], Path] = {}
    for number, seed in enumerate(every):
        out = root / f"baseline-{number}"
        result = worker.run([seed.command[0], str(seed.directory), str(out), *seed.command[1:], "-q"], root)
        if result["code"] != 0:
            raise RuntimeError(f"{seed.directory} does not convert: {result['err']}")
        baselines[seed.directory.name, seed.command] = out
    begin, number = time.monotonic(), first
    try:
        while (count is None or number - first < count) and (seconds is None or time.monotonic() - begin < seconds):
            seed = chosen[number % len(chosen)]
            _one(root / "run", seed, number, worker, counts, baselines[seed.directory.name, seed.command])
            number += 1
            yield counts
    finally:
        worker.close()


def _one(work: Path, seed: seeds.Seed, number: int, worker: Worker, counts: Counts, baseline: Path) -> None:
    oracle.remove(work)
    work.mkdir()
    source, out = work / "src", work / "dst"
    shutil.copytree(seed.directory, source, copy_function=shutil.copyfile)
    rng = random.Random(f"{seed.reader} {seed.kind} {number}")
    broken = mutate(source, seed.pattern, seed.kind, rng)
    arguments = [seed.command[0], str(source), str(out), *seed.command[1:], "-q"]
    result = worker.run(arguments, work)
    counts.runs += 1
    counts.by_reader[seed.reader] += 1
    counts.slowest, counts.peak = max(counts.slowest, result["seconds"]), max(counts.peak, result["peak"])
    what = _fault(result, work, out)
    if not what and result["code"] == 0:
        what = _wrong(source, out, work, seed, worker, counts, baseline)
    elif not what:
        counts.refused += 1
        if Path(broken).name not in result["err"] and seed.kind != "files":
            counts.unnamed.append(f"{number} {broken}: {result['err']}")
    if what:
        counts.findings.append(
            {"number": number, "reader": seed.reader, "file": broken, "what": what.partition("\n")[0][:160], "text": what,
             "err": result["err"], "command": " ".join(arguments)}
        )  # fmt: skip


def _fault(result: dict[str, Any], work: Path, out: Path) -> str:  # noqa: PLR0911 - one return per fault
    """What is wrong with a run whatever it was given."""
    err = result["err"]
    if result["gone"]:
        return str(result["gone"])
    if result["peak"] > MEMORY:
        return f"memory: {result['peak'] >> 20} MiB"
    if result["seen"] or any(work.rglob(CANARY)):
        return f"executed: {result['seen']}"
    if "Traceback" in err or result["code"] not in (0, 1, 2):
        return f"traceback: {err.strip().splitlines()[-1] if err.strip() else result['code']}"
    if "bug in shardtool" in err or "MemoryError" in err or "RecursionError" in err:
        return f"not an error of ours: {err.splitlines()[0]}"
    if result["code"] and (err.count("error: ") != 1 or not err.startswith("error: ")):
        return f"not one error: {err}"
    if result["code"] and out.exists():
        return "an error, and DST is there"
    return ""


def _wrong(
    source: Path, out: Path, work: Path, seed: seeds.Seed, worker: Worker, counts: Counts, baseline: Path
) -> str:
    """What is wrong with an output."""
    clean, expected = work / "clean", work / "expected"
    try:
        oracle.rewrite(source, clean)
    except oracle.UnreadableError as error:
        counts.unreadable += 1
        difference = oracle.same_files(out, baseline)
        return f"wrong: accepted, the independent reader says {error}, and {difference}" if difference else ""
    result = worker.run([seed.command[0], str(clean), str(expected), *seed.command[1:], "-q"], work)
    if result["code"] != 0:
        return f"wrong: accepted, but not in clean files: {result['err']}"
    counts.accepted += 1
    difference = oracle.same_files(out, expected)
    return f"wrong: {difference}" if difference else ""


def main(arguments: list[str]) -> int:
    """scripts/fuzz: exit 0 when nothing was found."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description="Break checkpoints and look at what the tool does."
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="stop after so many seconds [default: 60, without --count]"
    )
    parser.add_argument("--count", type=int, default=None, help="stop after so many broken inputs")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one; a finding names its number")
    parser.add_argument("--json", type=Path, default=None, help="where to write the findings and the unnamed errors")
    parser.add_argument("--keep", type=Path, default=None, help="work here and keep the last input")
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(seeds.READERS))
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.readers) - set(seeds.READERS)):
        parser.error(f"unknown reader {', '.join(unknown)}; known: {', '.join(seeds.READERS)}")
    seconds = given.seconds if given.seconds or given.count else 60.0
    counts, shown, told = Counts(), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        root = given.keep or Path(temporary)
        oracle.remove(root)
        root.mkdir()
        readers = tuple(given.readers) or seeds.READERS
        for counts in campaign(root, readers, count=given.count, seconds=seconds, first=given.first):
            for finding in counts.findings[told:]:
                sys.stderr.write(
                    f"\n#{finding['number']} {finding['reader']}, {finding['file']}: {finding['text']}\n{finding['err']}\n"
                )
            told = len(counts.findings)
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                sys.stderr.write(f"{counts.runs} runs, {len(counts.findings)} findings\n")
    if given.json:
        given.json.write_text(json.dumps({"findings": counts.findings, "unnamed": counts.unnamed}, indent=1))
    sys.stdout.write("\n".join(counts.lines()) + "\n")
    return 1 if counts.findings else 0
