"""The mutants: right checkpoints with one fault each, of the kind that conversion tools have had.

A fault is planted in the files, after a right conversion; `verify` must reject every one. Where a fault is known from
another tool, its thread is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Plant = Callable[[Path], None]


@dataclass(frozen=True)
class Mutant:
    """One fault: planted by `plant` in the model of configs/tiny, converted with these options.

    `options` are hf2megatron's. "hf" stands for a conversion there and back, so that the fault is in a Hugging Face
    directory; "source" for a fault in what is converted, as a tool that reads it wrongly would have it. `silent`: no
    logits can show it, because the function is the same but for rounding, or because the logits level runs no rank that
    has it. `diff` is the code that `shardtool diff` must give, where it can name the fault.
    """

    name: str
    family: str
    model: str
    plant: Plant
    options: tuple[object, ...] = ()
    silent: bool = False
    diff: str | None = None
    seen: str = ""  # where this has happened


def all_mutants() -> tuple[Mutant, ...]:
    """All of them, by family."""
    import mutants_dense
    import mutants_experts
    import mutants_exported
    import mutants_folded
    import mutants_gpt2
    import mutants_latent

    found = (
        *mutants_dense.MUTANTS, *mutants_gpt2.MUTANTS, *mutants_experts.MUTANTS, *mutants_latent.MUTANTS,
        *mutants_folded.MUTANTS, *mutants_exported.MUTANTS,
    )  # fmt: skip
    names = [mutant.name for mutant in found]
    assert len(set(names)) == len(names), "two mutants of one name"
    return found


def by_name(name: str) -> Mutant:
    """One of them."""
    return next(mutant for mutant in all_mutants() if mutant.name == name)
