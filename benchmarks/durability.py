"""What syncing and checksums cost: a synthetic Llama to Megatron and back, with and without each, against cp and sync.

    python benchmarks/durability.py [--gigabytes 2] [--rounds 5] [--work DIR] [--brief]

All variants take turns in every round; medians of the seconds are printed, and the ratios to the run without either.
With --brief hf2megatron alone, as it is and without either: for models that do not fit in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import synthetic

from shardtool import convert
from shardtool.layout.mesh import Mesh


def timed(dst: Path, do: Callable[[], object]) -> float:
    """The seconds that making `dst` takes, with nothing left to write by what came before."""
    os.sync()
    started = time.perf_counter()
    do()
    seconds = time.perf_counter() - started
    shutil.rmtree(dst)
    return seconds


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--brief", action="store_true")
    given = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(dir=given.work, prefix="shardtool-bench-") as folder:
        work = Path(folder)
        size = synthetic.build(work / "hf", synthetic.llama(given.gigabytes))
        options = convert.MegatronOptions(Mesh(4, 2), format="torch")
        if not given.brief:
            convert.execute(convert.prepare_hf2megatron(work / "hf", options), work / "megatron")
        ways: dict[str, Callable[[], convert.Prepared]] = {
            "hf2megatron": lambda: convert.prepare_hf2megatron(work / "hf", options),
            "megatron2hf": lambda: convert.prepare_megatron2hf(work / "megatron", None),
        }
        dst = work / "dst"

        def copy() -> None:
            subprocess.run(["cp", "-r", work / "hf", dst], check=True)
            os.sync()

        for _ in range(given.rounds):
            for way, prepare in list(ways.items())[: 1 if given.brief else 2]:
                seconds[way]["cp, sync"].append(timed(dst, copy))
                for durable in (True, False):
                    for sums in (durable,) if given.brief else (True, False):
                        do = lambda p=prepare, d=durable, s=sums: convert.execute(p(), dst, durable=d, checksums=s)  # noqa: E731
                        seconds[way][f"{'fsync' if durable else '-'}, {'sha256' if sums else '-'}"].append(
                            timed(dst, do)
                        )
    sys.stdout.write(
        f"{size / 1e9:.1f} GB, {given.rounds} rounds, medians in s (and as a ratio to the run without either)\n"
    )
    for way, found in seconds.items():
        base = statistics.median(found["-, -"])
        for name, values in found.items():
            median = statistics.median(values)
            sys.stdout.write(
                f"{way:<12} {name:<14} {median:6.2f} ({median / base:.2f})  {min(values):.2f} to {max(values):.2f}\n"
            )


if __name__ == "__main__":
    main()
