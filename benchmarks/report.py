"""The measurements of a results file (JSON lines) as the tables of README.md, and as a plot.

report.py RESULTS README PLOT
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt  # the backend is chosen first

Row = dict[str, Any]
MARK = "<!-- measured -->"
BASE = {"shardtool": "cp, sync", "cp, sync": "cp, sync"}  # what a technique is compared with; the others with cp


def ratios(rows: Iterable[Row], technique: str) -> list[float]:
    """A technique's wall time over that of its `cp`, in each round that has both."""
    rounds: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        rounds[row["round"]][row["technique"]] = row["wall"]
    base = BASE.get(technique, "cp")
    return [held[technique] / held[base] for held in rounds.values() if technique in held and base in held]


def median(values: list[float]) -> str:
    """The median, with two digits."""
    return f"{statistics.median(values):.2f}" if values else ""


def spread(values: list[float]) -> str:
    """The median, and the lowest and highest."""
    return f"{median(values)} ({min(values):.2f} to {max(values):.2f})" if values else ""


def seconds(rows: Iterable[Row], technique: str) -> str:
    """The median of a technique's wall time."""
    return median([row["wall"] for row in rows if row["technique"] == technique])


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    shown = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]]
    return [*shown, ""]


def grouped(rows: list[Row], kind: str, *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of a kind by these fields, in order."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == kind:
            found[tuple(row[name] for name in names)].append(row)
    return dict(sorted(found.items(), key=lambda item: tuple(str(field) for field in item[0])))


def times(rows: list[Row]) -> list[str]:
    """Every direction and format."""
    lines = []
    for (shape, gb, direction, form), held in grouped(rows, "time", "shape", "gb", "direction", "format").items():
        plain = [
            round_["plain script"] / round_["shardtool, no sync"]
            for round_ in by_round(held).values()
            if {"plain script", "shardtool, no sync"} <= round_.keys()
        ]
        lines.append([
            f"{shape} {gb} GB", direction, form, spread(ratios(held, "shardtool, no sync")),
            spread(ratios(held, "shardtool")), median(plain), seconds(held, "cp"),
            str(sum(row["technique"] == "shardtool, no sync" for row in held)),
        ])  # fmt: skip
    head = [
        "model",
        "direction",
        "format",
        "x of cp",
        "synced, x of cp + sync",
        "plain script / shardtool",
        "cp (s)",
        "rounds",
    ]
    return table(head, lines)


def by_round(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Wall time by round and technique."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        found[row["round"]][row["technique"]] = row["wall"]
    return found


def memory(rows: list[Row]) -> list[str]:
    """Peak anonymous memory."""
    lines = []
    for (technique, direction, form), held in grouped(rows, "memory", "technique", "direction", "format").items():
        by_size = {f"{row['shape']} {row['gb']} GB": f"{row['peak'] / 2**20:.0f}" for row in held}
        limited = {True: "yes", False: "no", None: ""}[held[-1]["limited"]]
        sizes = ", ".join(f"{name}: {peak}" for name, peak in by_size.items())
        lines.append([technique, direction, form, sizes, limited])
    return table(
        ["", "direction", "format", "peak anonymous memory (MiB)", "completes under RLIMIT_DATA 128 MiB"], lines
    )


def values(rows: list[Row]) -> list[str]:
    """Conversions that change values."""
    peaks = {(row["shape"], row["gb"]): row["peak"] for row in rows if row["kind"] == "values memory"}
    lines = [
        [
            f"{shape} {gb} GB",
            dtype,
            spread(ratios(held, "shardtool, no sync")),
            f"{peaks.get((shape, gb), 0) / 2**20:.0f}",
        ]
        for (shape, gb, dtype), held in grouped(rows, "values", "shape", "gb", "dtype").items()
    ]
    return table(["model", "to", "x of cp of the bytes written", "peak anonymous memory (MiB)"], lines)


def scaling(rows: list[Row]) -> list[str]:
    """Over threads and processes."""
    lines = [
        [f"{shape} {gb} GB", technique, spread([row["wall"] for row in held]), median([row["cpu"] for row in held])]
        for (shape, gb, technique), held in grouped(rows, "scaling", "shape", "gb", "technique").items()
    ]
    return table(["model", "hf2megatron torch with", "wall (s)", "CPU (s)"], lines)


def reflink(rows: list[Row]) -> list[str]:
    """Blocks shared with the source."""
    lines = []
    for (shape, gb, technique), held in grouped(rows, "reflink", "shape", "gb", "technique").items():
        if technique == "not run":
            lines.append([f"{shape} {gb} GB", f"not run: {held[-1]['why']}", "", ""])
        elif technique != "cp":
            group = [row for row in rows if row["kind"] == "reflink" and (row["shape"], row["gb"]) == (shape, gb)]
            within = [{**row, "wall": row["within"]} for row in group]
            lines.append(
                [f"{shape} {gb} GB", technique, median(ratios(group, technique)), median(ratios(within, technique))]
            )
    return table(["model, tp 1 pp 4, on XFS", "", "x of cp --reflink=never", "without the start of the process"], lines)


def small(rows: list[Row]) -> list[str]:
    """Latencies."""
    lines = []
    for (name,), held in grouped(rows, "help", "technique").items():
        lines.append([f"shardtool {name}", median([row["wall"] for row in held])])
    for (name, layout, form), held in grouped(rows, "plan", "technique", "layout", "format").items():
        last = held[-1]
        what = f"plan of {name}, {layout}, {form}: {last['bytes'] / 1e9:,.0f} GB in {last['files']:,} files"
        lines.append([what, median([row["wall"] for row in held])])
    return table(["", "seconds"], lines)


def plot(rows: list[Row], path: Path) -> None:
    """Time as a multiple of cp's, by direction and size."""
    cases = grouped(rows, "time", "shape", "gb", "direction", "format")
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(cases) + 1.2))
    labels = [f"{shape} {gb} GB {direction} {form}" for shape, gb, direction, form in cases]
    for at, held in enumerate(cases.values()):
        found = ratios(held, "shardtool, no sync")
        axes.barh(at, statistics.median(found) if found else 0, color="#4878a8")
        axes.plot(found, [at] * len(found), "k.", markersize=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("wall time of the whole process, as a multiple of cp of the same bytes (bars: medians)")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(results: str, readme: str, picture: str) -> None:
    """Put the tables behind the mark in the README."""
    rows = [json.loads(line) for line in Path(results).read_text().splitlines()]
    if any(row["kind"] == "time" for row in rows):
        plot(rows, Path(picture))
    page = Path(readme)
    head = page.read_text().split(MARK)[0]
    machines = sorted({f"{row['machine']}, commit {row['commit']}" for row in rows})
    held = {row["held_back"] for row in rows if "held_back" in row}
    limits = {(True,): " Dirty memory held back.", (False,): " Dirty memory not held back."}.get(tuple(held), "")
    lines = [f"Machine: {'; '.join(machines)}. File system: ext4.{limits}", ""]
    for title, part in (
        ("Time", times), ("Memory", memory), ("Where values change", values), ("Threads and processes", scaling),
        ("Reflinks", reflink), ("Start and plan", small),
    ):  # fmt: skip
        made = part(rows)
        lines += [f"## {title}", "", *made] if len(made) > 3 else []
    if Path(picture).exists():
        lines += [f"![times]({Path(picture).name})", ""]
    page.write_text(head + MARK + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
