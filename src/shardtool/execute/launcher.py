"""What a launcher (torchrun, srun) tells a process about the job that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shardtool.errors import UsageError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _started_by_srun(environment: Mapping[str, str]) -> bool:
    """In a step of srun, and not below torchrun, which speaks for itself. The script of sbatch is in none."""
    return "RANK" not in environment and "WORLD_SIZE" not in environment and "SLURM_STEP_ID" in environment


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, number of ranks) of this process: (0, 1) without a launcher. UsageError where they make no sense.

    RANK and WORLD_SIZE as torchrun sets them, else SLURM_PROCID and SLURM_NTASKS in a job step that srun has started.
    """
    names = ("SLURM_PROCID", "SLURM_NTASKS") if _started_by_srun(environment) else ("RANK", "WORLD_SIZE")
    given = [environment.get(name, default) for name, default in zip(names, "01", strict=True)]
    try:
        rank, size = map(int, given)
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise UsageError(
            f"{names[0]} and {names[1]} in the environment make no sense",
            expected=f"0 <= {names[0]} < {names[1]}, as the launcher sets them",
            found=" ".join(f"{name}={environment.get(name)}" for name in names),
            hint="unset both to run one process",
        )
    return rank, size


def neighbours(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks of the job this node has; 0 where the launcher does not tell.

    torchrun counts them. srun counts nodes: what it starts on several is spread evenly, unless it is told otherwise.
    Who starts ranks by hand and meets at a loopback address has them all on one node.
    """
    if "LOCAL_WORLD_SIZE" in environment:
        return _number(environment["LOCAL_WORLD_SIZE"])
    if _started_by_srun(environment):
        counts = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
        nodes = next((_number(environment[name]) for name in counts if name in environment), 0)
        if nodes:
            return -(-_number(environment.get("SLURM_NTASKS", "1")) // nodes)
    if environment.get("MASTER_ADDR", "").strip("[]") in LOOPBACK:
        return _number(environment.get("WORLD_SIZE") or environment.get("SLURM_NTASKS", "1"))
    return 0


def cores(environment: Mapping[str, str] = os.environ) -> int:
    """How many cores this process may use: its own, or its share of those that the ranks of its node have together."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    node = os.cpu_count() or 1
    if "SLURM_STEP_ID" in environment:
        node = _number(environment.get("SLURM_CPUS_ON_NODE", "")) or node
    return max(1, min(bound, node // max(1, neighbours(environment))))


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
