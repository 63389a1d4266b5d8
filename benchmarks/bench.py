"""Conversions against `cp` and the plain script: results go line by line into a JSONL file, `report.py` makes the page.

    bench.py build WORK SHAPE GB                       a synthetic checkpoint, and it converted to both Megatron formats
    bench.py time WORK SHAPE GB DIRECTION FORMAT       rounds of every technique, one after the other
    bench.py memory WORK SHAPE GB                      peak anonymous memory of every direction and format
    bench.py values WORK SHAPE GB                      where values change: llama to fp32, fp8 to bf16
    bench.py scaling WORK SHAPE GB                     over threads and processes
    bench.py reflink WORK SHAPE GB                     a split into pipeline stages on a file system with reflinks
    bench.py small                                     latency of --help, plan time by family

SHAPE is llama, mixtral or fp8, FORMAT torch or torch_dist. Every round measures all techniques, in turning order.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import plans
import synthetic

HERE = Path(__file__).parent
PYTHON = sys.executable
SHARDTOOL = [PYTHON, "-m", "shardtool"]
WITHOUT_SYNC = [PYTHON, str(HERE / "without_sync.py")]
PLAIN = [PYTHON, str(HERE / "plain.py")]
DIRECTIONS = ("hf2megatron", "megatron2hf", "reshard")
FORMATS = ("torch", "torch_dist")
LIMIT = 128 << 20  # RLIMIT_DATA under which every conversion must complete


def folder(work: Path, shape: str, gigabytes: int) -> Path:
    """Where a model's checkpoints are: hf, torch and torch_dist (both tp 4 pp 2)."""
    return work / f"{shape}-{gigabytes}"


def build(work: Path, shape: str, gigabytes: int) -> None:
    """Make a model, and convert it to tp 4 pp 2 in both formats."""
    base = folder(work, shape, gigabytes)
    config = {"llama": synthetic.llama, "mixtral": synthetic.mixtral, "fp8": synthetic.fp8}[shape](gigabytes)
    if not (base / "hf").exists():
        synthetic.build(base / "hf", config)
        shutil.copy(base / "hf" / "config.json", base / "config.json")  # for the plain script
    for form in FORMATS if shape != "fp8" else ():
        if not (base / form).exists():
            command = [*WITHOUT_SYNC, *conversion("hf2megatron", base, base / form, form), "-q"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=measure.ENVIRONMENT)


def conversion(direction: str, base: Path, out: Path, form: str) -> list[str]:
    """The arguments of a conversion: tp 4 pp 2, reshard to tp 2 pp 4."""
    if direction == "hf2megatron":
        return [direction, str(base / "hf"), str(out), "--tp", "4", "--pp", "2", "--format", form]
    source = [direction, str(base / form), str(out)]
    return source if direction == "megatron2hf" else [*source, "--tp", "2", "--pp", "4"]


def techniques(direction: str, base: Path, out: Path, form: str, plain: bool) -> dict[str, list[str]]:
    """Each technique's command. `cp` neither waits for the device nor hashes, so there are two pairs."""
    source = base / "hf" if direction == "hf2megatron" else base / form
    arguments = [*conversion(direction, base, out, form), "-q"]
    copy = ["cp", "-r", str(source), str(out)]
    found = {
        "cp": copy,
        "shardtool, no sync": [*WITHOUT_SYNC, *arguments, "--no-checksums"],
        "cp, sync": ["sh", "-c", 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +', "sh", str(source), str(out)],
        "shardtool": [*SHARDTOOL, *arguments],
    }
    if plain:
        sizes = ["4", "2", "2", "4"] if direction == "reshard" else ["4", "2"]
        found["plain script"] = [*PLAIN, direction, str(source), str(out), form, *sizes]
    return found


def record(results: Path, **row: Any) -> None:
    """Add a line to the results."""
    with results.open("a") as file:
        file.write(json.dumps({**row, "commit": commit(), "machine": machine()}) + "\n")


def commit() -> str:
    """The commit that is measured, with a + where the files differ from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "status", "--porcelain", "-uno", "--", "../src"], cwd=HERE, capture_output=True,
                                 text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout else "")


def machine() -> str:
    """CPU, cores and memory."""
    names = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return f"{', '.join(sorted(names))}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB"


def file_system(path: Path) -> str:
    """The type of the file system that a path is on."""
    held = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return held.stdout.strip()


def time_rounds(options: argparse.Namespace) -> None:
    """Measure all techniques `rounds` times."""
    base, out = folder(options.work, options.shape, options.gb), options.work / f"out-{options.run}"
    commands = techniques(options.direction, base, out, options.format, options.plain)
    if options.only:
        commands = {name: command for name, command in commands.items() if name in options.only}
    source = base / "hf" if options.direction == "hf2megatron" else base / options.format
    for held in ("hf", *FORMATS):
        if base / held != source:
            measure.cool(base / held)
    for number in range(options.rounds):
        turned = list(commands)[number % len(commands) :] + list(commands)[: number % len(commands)]
        for name in turned:
            wall, cpu = measure.timed(commands[name], out, source=source)
            record(options.results, kind="time", shape=options.shape, gb=options.gb, direction=options.direction,
                   format=options.format, technique=name, wall=wall, cpu=cpu, round=f"{options.run}-{number}",
                   disk=file_system(options.work), held_back=options.held_back)  # fmt: skip


def memory(options: argparse.Namespace) -> None:
    """Peak anonymous memory of every conversion, and whether it completes under the limit."""
    base, out = folder(options.work, options.shape, options.gb), options.work / f"out-{options.run}"
    for direction, form in ((direction, form) for direction in DIRECTIONS for form in FORMATS):
        for name, command in techniques(direction, base, out, form, options.plain).items():
            if name not in ("shardtool, no sync", "plain script"):
                continue
            peak = measure.anonymous_peak(command, out)
            limited = None
            if name != "plain script":
                done = subprocess.run(command, capture_output=True, env=measure.ENVIRONMENT, check=False,
                                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)))  # fmt: skip
                limited = done.returncode == 0
                measure.remove(out)
            record(options.results, kind="memory", shape=options.shape, gb=options.gb, direction=direction, format=form,
                   technique="plain script" if name == "plain script" else "shardtool", peak=peak, limited=limited)  # fmt: skip


def values(options: argparse.Namespace) -> None:
    """A conversion that changes values, against `cp` of what it writes; its memory."""
    base, out, copy = (
        folder(options.work, options.shape, options.gb),
        options.work / f"out-{options.run}",
        options.work / f"written-{options.run}",
    )
    dtype = "fp32" if options.shape == "llama" else "bf16"
    arguments = [*conversion("hf2megatron", base, out, "torch"), "--dtype", dtype, "-q"]
    measure.remove(copy)
    subprocess.run([*WITHOUT_SYNC, *conversion("hf2megatron", base, copy, "torch"), "--dtype", dtype, "-q"], check=True,
                   stdout=subprocess.DEVNULL, env=measure.ENVIRONMENT)  # fmt: skip
    techniques = {
        "cp": ["cp", "-r", str(copy), str(out)],
        "shardtool, no sync": [*WITHOUT_SYNC, *arguments, "--no-checksums"],
    }
    for number in range(options.rounds):
        measure.warm(base / "hf")
        measure.warm(copy)
        for name, command in list(techniques.items())[:: -1 if number % 2 else 1]:
            wall, cpu = measure.timed(command, out)
            record(options.results, kind="values", shape=options.shape, gb=options.gb, dtype=dtype, technique=name,
                   wall=wall, cpu=cpu, round=f"{options.run}-{number}")  # fmt: skip
    record(options.results, kind="values memory", shape=options.shape, gb=options.gb, dtype=dtype,
           peak=measure.anonymous_peak(techniques["shardtool, no sync"], out))  # fmt: skip
    measure.remove(copy)


def ranks(number: int, command: list[str]) -> list[str]:
    """A command that starts this many ranks as srun does on one node: at once, and ended with the last."""
    start = 'for r in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$r "$@" & pids="$pids $!"; done'
    script = f"{start}; for p in $pids; do wait $p || exit 1; done"
    step = [f"SLURM_JOB_ID={os.getpid()}", "SLURM_STEP_ID=0", "SLURM_STEP_NUM_NODES=1", f"SLURM_NTASKS={number}"]
    return ["env", *step, "sh", "-c", script, "sh", *command]


def scaling(options: argparse.Namespace) -> None:
    """hf2megatron with 1, 2 and 4 threads, as processes of one thread each, and as such processes under torchrun."""
    base, out = folder(options.work, options.shape, options.gb), options.work / f"out-{options.run}"
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--no-python", "--standalone"]
    inner = [*WITHOUT_SYNC, *conversion("hf2megatron", base, out, "torch"), "-q", "--no-checksums"]
    commands = {"cp": ["cp", "-r", str(base / "hf"), str(out)]}
    commands |= {f"{jobs} threads": [*inner, "--jobs", str(jobs)] for jobs in (1, 2, 4)}
    for processes in (2, 3):
        commands[f"{processes} processes"] = ranks(processes, [*inner, "--jobs", "1"])
    for processes in (1, 2):
        given = [*torchrun, "--nproc-per-node", str(processes), *inner, "--jobs", "1"]
        commands[f"{processes} processes, torchrun"] = given
    for number in range(options.rounds):
        measure.warm(base / "hf")
        for name, command in commands.items():
            wall, cpu = measure.timed(command, out)
            record(options.results, kind="scaling", shape=options.shape, gb=options.gb, technique=name, wall=wall, cpu=cpu,
                   round=f"{options.run}-{number}")  # fmt: skip


def reflink(options: argparse.Namespace) -> None:
    """A split into pipeline stages on an XFS image, blocks shared, against `cp` of every byte; needs root."""
    base, place, image = folder(options.work, options.shape, options.gb), options.work / "xfs", options.work / "xfs.img"
    place.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(int(options.gb * 3e9) + (1 << 30))
    make = [["mkfs.xfs", "-q", "-f", str(image)], ["mount", "-o", "loop", str(image), str(place)]]
    try:
        for command in make:
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        record(options.results, kind="reflink", shape=options.shape, gb=options.gb, technique="not run", why=str(error))
        image.unlink()
        return
    try:
        shutil.copytree(base / "hf", place / "hf")
        commands = {"cp": ["cp", "--reflink=never", "-r", str(place / "hf"), str(place / "out")]}
        for form in FORMATS:
            commands[form] = [*WITHOUT_SYNC, "hf2megatron", str(place / "hf"), str(place / "out"), "--pp", "4", "--format",
                              form, "-q", "--no-checksums", "--reflink", "--json"]  # fmt: skip
        for number in range(options.rounds):
            measure.warm(place / "hf")
            for name, command in commands.items():
                told: list[str] = []
                wall, cpu = measure.timed(command, place / "out", told=told)
                within = json.loads(told[0])["seconds"] if name != "cp" else wall
                record(options.results, kind="reflink", shape=options.shape, gb=options.gb, technique=name, wall=wall,
                       cpu=cpu, within=within, round=f"{options.run}-{number}")  # fmt: skip
    finally:
        subprocess.run(["umount", str(place)], check=True)
        image.unlink()


def small(options: argparse.Namespace) -> None:
    """Latency of --help, and plan time by family."""
    for name, command in (("--help", ["--help"]), ("hf2megatron --help", ["hf2megatron", "--help"])):
        seconds = []
        for _ in range(2 * options.rounds):
            started = time.perf_counter()
            subprocess.run([*SHARDTOOL, *command], capture_output=True, check=True, env=measure.ENVIRONMENT)
            seconds.append(time.perf_counter() - started)
        record(options.results, kind="help", technique=name, wall=statistics.median(seconds))
    for row in plans.rows(options.rounds):
        record(options.results, kind="plan", **row)


def commands() -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Subcommands: name, function, positional arguments."""
    yield "build", lambda o: build(o.work, o.shape, o.gb), ("work", "shape", "gb")
    yield "time", time_rounds, ("work", "shape", "gb", "direction", "format")
    yield "memory", memory, ("work", "shape", "gb")
    yield "values", values, ("work", "shape", "gb")
    yield "scaling", scaling, ("work", "shape", "gb")
    yield "reflink", reflink, ("work", "shape", "gb")
    yield "small", small, ()


def main() -> None:
    """Parse the arguments and run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True)
    kinds: dict[str, dict[str, Any]] = {
        "work": {"type": Path}, "shape": {"choices": ("llama", "mixtral", "fp8")}, "gb": {"type": int},
        "direction": {"choices": DIRECTIONS}, "format": {"choices": FORMATS},
    }  # fmt: skip
    for name, function, arguments in commands():
        sub = subparsers.add_parser(name)
        for argument in arguments:
            sub.add_argument(argument, **kinds[argument])
        sub.add_argument("--results", type=Path, default=HERE / "results.jsonl")
        sub.add_argument("--rounds", type=int, default=5)
        sub.add_argument("--plain", action="store_true", help="the plain script, too")
        sub.add_argument("--only", action="append", help="this technique only (may be repeated)")
        sub.set_defaults(function=function, run=f"{time.time():.0f}")
    options = parser.parse_args()
    with measure.held_back() as options.held_back:
        options.function(options)


if __name__ == "__main__":
    main()
