"""Puts the verifier on trial: every mutant must be rejected, every right conversion accepted.

    python tests/mutants/trial.py [--out docs/mutants.md] [NAME...]

Prints a table and exits 1 where a mutant passes or a right conversion is refused.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from builds import quantise, with_multi_token_prediction  # noqa: E402
from catalogue import Mutant, all_mutants  # noqa: E402
from commands import done  # noqa: E402
from shardtool import tiny  # noqa: E402
from shardtool.diff import diff  # noqa: E402
from shardtool.errors import ShardtoolError  # noqa: E402
from shardtool.verify.judge import LogitsOptions, verify  # noqa: E402

CONFIGS = HERE.parents[1] / "configs" / "tiny"
LEVELS = ("accounting", "exact", "logits")


class Workshop:
    """Builds models and right conversions, each once, and wrong ones from them."""

    def __init__(self, root: Path, build: Callable[[str], Path] | None = None) -> None:
        self.root = root
        self._build = build

    def model(self, name: str, dtype: str = "float32") -> Path:
        """The Hugging Face directory of a tiny model; `_mtp`: with its MTP layer, `_fp8`: with linears in FP8."""
        if self._build is not None and dtype == "float32" and not name.endswith(("_mtp", "_fp8")):
            return self._build(name)
        out = self.root / f"{name}-{dtype}"
        if not out.exists() and name.endswith("_fp8"):
            return quantise(self.model(name.removesuffix("_fp8")), out)
        if not out.exists():
            tiny.build(CONFIGS / f"{name.removesuffix('_mtp')}.json", out, dtype=dtype)
            if name.endswith("_mtp"):
                with_multi_token_prediction(out)
        return out

    def right(self, name: str, options: Iterable[object], dtype: str = "float32") -> Path:
        """A right conversion of a model; "hf" in the options: there and back."""
        given = [str(option) for option in options]
        out = self.root / "-".join(["right", name, dtype, *given]).replace("--", "")
        if not out.exists() and given == ["hf"]:
            megatron = self.right(name, ("--format", "torch", "--tp", "2"), dtype)
            done("megatron2hf", megatron, out, "-q", "--hf", self.model(name, dtype))
        elif not out.exists():
            form = [] if "--format" in given else ["--format", "torch"]
            done("hf2megatron", self.model(name, dtype), out, "-q", *form, *given)
        return out

    def wrong(self, mutant: Mutant) -> Path:
        """A copy of the right conversion with the fault in it."""
        out = self.root / "wrong"
        shutil.rmtree(out, ignore_errors=True)
        if mutant.options[:1] == ("source",):
            source = self.root / "source"
            shutil.rmtree(source, ignore_errors=True)
            shutil.copytree(self.model(mutant.model), source)
            mutant.plant(source)
            done("hf2megatron", source, out, "-q", *mutant.options[1:])
            return out
        shutil.copytree(self.right(mutant.model, mutant.options), out)
        mutant.plant(out)
        return out


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: each level's answer (None: it could not be asked), the metric, what diff calls it."""

    mutant: Mutant
    levels: dict[str, bool | None]
    ratio: float | None
    threshold: float | None
    codes: tuple[str, ...]
    refused: str = ""  # the first line of the error where the checkpoint could not even be opened

    @property
    def caught(self) -> bool:
        """Some level has rejected it."""
        return bool(self.refused) or False in self.levels.values()

    @property
    def complaints(self) -> list[str]:
        """What the verifier or the diff did not see and should have."""
        found = []
        if not self.caught:
            found.append("not caught by any level")
        if not self.mutant.silent and not self.refused and self.levels.get("logits") is not False:
            found.append("changes the function, and the logits level passes it")
        if self.mutant.diff and self.mutant.diff not in self.codes:
            found.append(f"diff says {', '.join(self.codes) or 'nothing'}, not {self.mutant.diff}")
        return found


def judge(workshop: Workshop, mutant: Mutant) -> Verdict:
    """Plant a fault and let `verify` and `diff` say what they see."""
    model, wrong = workshop.model(mutant.model), workshop.wrong(mutant)
    codes: tuple[str, ...] = ()
    try:
        findings = diff(model, wrong).findings
        codes = tuple(dict.fromkeys(item for one in findings for item in (*(d.code for d in one.diagnoses), one.kind)))
    except ShardtoolError:
        pass
    try:
        report = verify(model, wrong)
    except ShardtoolError as error:
        return Verdict(mutant, {}, None, None, codes, error.what)
    answers = {level.name: level.passed for level in report.levels}
    logits = next(level for level in report.levels if level.name == "logits")
    return Verdict(mutant, answers, logits.numbers.get("ratio"), logits.numbers.get("threshold"), codes)  # type: ignore[arg-type]


# --- right conversions -----------------------------------------------------------------------------------------------

RIGHT_MODELS: dict[str, tuple[tuple[object, ...], ...]] = {
    "llama": (("--tp", 2, "--pp", 2), ("--format", "torch_dist", "--tp", 4), ("hf",)),
    "llama3": (("--tp", 2),),
    "llama_tied": (("--pp", 2),),
    "mistral": (("--tp", 2),),
    "qwen2": (("--tp", 4), ("--pp", 2, "--vpp", 2)),
    "qwen3": (("--format", "torch_dist", "--pp", 2),),
    "gpt2": (("--tp", 2, "--pp", 2),),
    "phi3": (("--tp", 2),),
    "starcoder2": (("--tp", 2),),
    "mixtral": (("--ep", 2),),
    "qwen2_moe": (("--tp", 2, "--ep", 2),),
    "qwen3_moe": (("--format", "torch_dist", "--ep", 2),),
    "deepseek_v3": (("--tp", 2, "--pp", 2),),
    "moonlight": (("--tp", 2),),
}
# computed in the stored dtype as well, in their first layout: four runs each
NATIVE = ("llama", "qwen2", "gpt2", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Right:
    """A right conversion and what `verify` says: stored in one dtype, computed in another."""

    model: str
    options: str
    stored: str
    computed: str
    passed: bool
    ratio: float | None
    threshold: float | None
    why: str = ""


def right_conversions(workshop: Workshop) -> Iterable[Right]:
    """Every right conversion, in every dtype, by `verify`'s default; and computed in the stored dtype."""
    for name, layouts in RIGHT_MODELS.items():
        for options in layouts:
            for stored, dtype in DTYPES.items():
                native = name in NATIVE and options == layouts[0]
                for computed in dict.fromkeys(("fp32", stored) if native else ("fp32",)):
                    a, b = workshop.model(name, dtype), workshop.right(name, options, dtype)
                    report = verify(a, b, options=LogitsOptions(dtype=computed))  # type: ignore[arg-type]
                    logits = report.levels[-1]
                    why = "; ".join(problem for level in report.levels for problem in level.problems)
                    yield Right(
                        name, " ".join(map(str, options)), stored, computed, report.passed,
                        logits.numbers.get("ratio"), logits.numbers.get("threshold"), why,
                    )  # type: ignore[arg-type]  # fmt: skip


# --- the table -------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """A measurement in the table."""
    return "" if value is None else f"{value:.1e}"


def mutant_row(verdict: Verdict) -> list[str]:
    """A mutant's row."""
    mutant = verdict.mutant
    marks = {True: "passes", False: "**caught**", None: "cannot ask"}
    asked = [marks[verdict.levels[name]] if name in verdict.levels else "" for name in LEVELS]
    if verdict.refused:
        asked[0] = "**refused**"
    elif verdict.levels.get("logits") is False:
        asked[2] += f" {number(verdict.ratio)}" if verdict.ratio is not None else " (does not load)"
    elif verdict.ratio is not None:
        asked[2] += f" {number(verdict.ratio)}"
    shown = mutant.diff if mutant.diff in verdict.codes else ""
    return [mutant.family, mutant.name, mutant.seen, *asked, (shown or "").replace("_", " ")]


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]


INTRODUCTION = """\
# The verifier on trial

Generated by `scripts/mutants`; do not edit. Each mutant is a right conversion of a tiny noisy model with one fault
planted in its files. The columns say which level of `verify` rejects it, with the measured
max |delta logit| / std(logits), and what `diff` calls the fault where it has a name for it.
"""


def document(verdicts: list[Verdict], rights: list[Right], fp32: float) -> str:
    """The Markdown page."""
    caught = sum(verdict.caught for verdict in verdicts)
    by = {name: sum(verdict.levels.get(name) is False for verdict in verdicts) for name in LEVELS}
    named = sum(bool(verdict.mutant.diff) and verdict.mutant.diff in verdict.codes for verdict in verdicts)
    lines = [
        INTRODUCTION,
        f"**{caught} of {len(verdicts)} mutants are caught** (accounting {by['accounting']}, exact {by['exact']}, logits"
        f" {by['logits']} at the threshold {fp32:.0e}, refused when opened"
        f" {sum(bool(verdict.refused) for verdict in verdicts)}). `diff` names {named} of them.",
        f"**{sum(not right.passed for right in rights)} of {len(rights)} right conversions are refused.**",
        "",
        "## Mutants",
        "",
        *table(
            ["family", "fault", "seen in", "accounting", "exact", "logits", "`diff` says"], map(mutant_row, verdicts)
        ),
        "",
        "## Right conversions",
        "",
        "Stored and computed in these dtypes; the threshold of a computation in bf16 or fp16 is measured (see"
        " [verification.md](verification.md)).",
        "",
        *table(
            ["model", "layout", "stored", "computed", "ratio", "threshold", "verdict"],
            (
                [right.model, right.options.replace("hf", "there and back"), right.stored, right.computed,
                 number(right.ratio), number(right.threshold), "passes" if right.passed else f"**refused**: {right.why}"]
                for right in rights
            ),
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the trial."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--no-right", action="store_true", help="mutants alone")
    parser.add_argument("--no-mutants", action="store_true", help="right conversions alone")
    parser.add_argument("names", nargs="*", help="parts of names of mutants")
    given = parser.parse_args(argv)
    chosen = [m for m in all_mutants() if not given.names or any(name in m.name for name in given.names)]
    verdicts, rights, bad, started = [], [], 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shardtool-mutants-") as scratch:
        workshop = Workshop(Path(scratch))
        for mutant in [] if given.no_mutants else chosen:
            verdict = judge(workshop, mutant)
            verdicts.append(verdict)
            bad += bool(verdict.complaints)
            print(" | ".join(mutant_row(verdict)).replace("**", ""), *(f"  !! {text}" for text in verdict.complaints))
        for right in [] if given.no_right or given.names else right_conversions(workshop):
            rights.append(right)
            bad += not right.passed
            print(right)
    fp32 = next((verdict.threshold for verdict in verdicts if verdict.threshold), 0.0)
    if given.out is not None:
        given.out.write_text(document(verdicts, rights, fp32))
    caught, refused = sum(verdict.caught for verdict in verdicts), sum(not right.passed for right in rights)
    print(f"{len(verdicts)} mutants, {caught} caught; {len(rights)} right conversions, {refused} refused;"
          f" {bad} complaints; {time.monotonic() - started:.0f} s")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
