"""A representative handful of the mutants; `scripts/mutants` runs all of them and the right conversions.

Here is one fault of each kind that only one level can see, and those that other tools are known for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from catalogue import all_mutants, by_name
from commands import command, done
from trial import LEVELS, Workshop, judge

DOCS = Path(__file__).parents[2] / "docs" / "mutants.md"

CHOSEN = (
    "q, k, v one after the other, not group by group",
    "keys permuted with the number of query heads",
    "[gate; up] cut over tp as one matrix",
    "tp rank files exchanged",
    "model chunks of each stage exchanged (vpp)",
    "the copy of a tied head is another",
    "one flipped bit, the last of the mantissa",
    "one weight is NaN",
    "epsilon 1e-6 for 1e-5",
    "attention window one too long",
    "gelu by erf for gelu by tanh",
    "q, k, v in the order of checkpoint version 1",
    "experts of two ep ranks exchanged",
    "one expert missing",
    "rope rows of the shared key as halves",
    "yarn's original length ignored",
    "q, k, v split one after the other",
    "padding rows exported, config with them",
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mutants"), tiny_model)


@pytest.mark.parametrize("name", CHOSEN)
def test_it_is_caught(name: str, workshop: Workshop, record_property: Callable[[str, object], None]) -> None:
    verdict = judge(workshop, by_name(name))
    record_property("ratio", verdict.ratio)
    assert verdict.caught
    assert verdict.complaints == []


def test_the_command_exits_1(workshop: Workshop) -> None:
    mutant = by_name("attention window one too long")
    model, wrong = workshop.model(mutant.model), workshop.wrong(mutant)
    result = command("verify", model, wrong, "--json", "-q")
    assert result.code == 1
    assert [level["passed"] for level in result.json["levels"]] == [False, True, False]
    done("verify", model, workshop.right(mutant.model, mutant.options), "-q")


@pytest.mark.parametrize("level", ["exact", "logits"])
def test_a_fault_is_caught_in_torch_dist_too(level: str, workshop: Workshop, tmp_path: Path) -> None:
    mutant = by_name("q, k, v one after the other, not group by group")
    wrong = workshop.wrong(mutant)
    done("reshard", wrong, tmp_path / "dist", "--format", "torch_dist", "--tp", 2, "--pp", 2, "-q")
    assert command("verify", workshop.model("llama"), tmp_path / "dist", "--level", level, "-q").code == 1


def test_half_precision_catches_what_rounding_cannot_hide(workshop: Workshop) -> None:
    from shardtool.verify.judge import LogitsOptions, verify

    mutant = by_name("gate and up of all experts swapped")
    report = verify(
        workshop.model(mutant.model), workshop.wrong(mutant), levels=["logits"], options=LogitsOptions(dtype="bf16")
    )
    assert not report.passed


def test_the_catalogue_is_what_the_page_shows() -> None:
    """docs/mutants.md is of these mutants, all caught: `scripts/mutants` writes it."""
    mutants = all_mutants()
    assert len(mutants) >= 100
    assert {"dense GQA", "MoE", "MLA", "GPT-2"} <= {mutant.family for mutant in mutants}
    page = DOCS.read_text()
    for mutant in mutants:
        assert f"| {mutant.name.replace('|', chr(92) + '|')} |" in page, f"{mutant.name}: run scripts/mutants"
    caught = re.search(r"\*\*(\d+) of (\d+) mutants are caught\*\*", page)
    assert caught is not None and caught[1] == caught[2] == str(len(mutants))
    refused = re.search(r"\*\*(\d+) of (\d+) right conversions are refused", page)
    assert refused is not None and refused[1] == "0" and int(refused[2]) >= 40
    assert all(name in page for name in LEVELS)
