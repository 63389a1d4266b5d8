"""Real processes that are killed at random moments, interrupted, or left without room, and started again.

    python tests/faults/killed.py [--runs 200] [--seed 0] [--signal KILL|INT|full] [--work DIR]

Each run converts a model of some 50 MB in one of six ways (three directions, both formats), perhaps over an old
directory (--overwrite). After the signal DST must be absent, the old one or the new one, whole; then the same command
must give the same bytes as an undisturbed run, and leave nothing else behind. Prints a table; exit 1 on any failure.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1280,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4000,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "float16", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
OLD = {"config.json": b"{}", "sub/weights": b"old" * 1000}
Tree = dict[str, str]


def model(directory: Path) -> Path:
    """A Llama of 50 MB with random weights."""
    hidden, ffn, vocab = 512, 1280, 4000
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(8):
        at = f"model.layers.{layer}."
        shapes |= {at + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {at + f"self_attn.{name}_proj.weight": (hidden // 2, hidden) for name in "kv"}
        shapes |= {at + f"mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {at + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    tensors = {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def tree(directory: Path) -> Tree:
    """Every file below a directory, by the SHA-256 of its content."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def command(arguments: list[str], dst: Path, *, overwrite: bool = False) -> list[str]:
    """A conversion as a command line."""
    return [sys.executable, "-m", "shardtool", *arguments[:2], str(dst), *arguments[2:]] + ["--overwrite"] * overwrite


@dataclass
class Case:
    """One conversion, what it gives undisturbed, and how long that takes."""

    name: str
    arguments: list[str]  # without DST
    expected: Tree = field(default_factory=dict)
    seconds: float = 0.0
    nbytes: int = 0
    files: int = 0  # that hold tensors


def cases(work: Path) -> list[Case]:
    """The six conversions with their undisturbed results; everything that they need is made below `work`."""
    source = str(model(work / "model"))
    torch, dist = str(work / "hf-torch"), str(work / "hf-torch_dist")
    small = ["--max-shard-size", "8MB"]
    made = [
        Case("hf-torch", ["hf2megatron", source, "--tp", "4", "--pp", "2", "--format", "torch"]),
        Case("hf-torch_dist", ["hf2megatron", source, "--tp", "2", "--pp", "4", "--format", "torch_dist", "--tensor-digests"]),
        Case("torch-hf", ["megatron2hf", torch, *small]),
        Case("torch_dist-hf", ["megatron2hf", dist, "--hf", source, *small]),
        Case("torch-torch_dist", ["reshard", torch, "--tp", "2", "--pp", "2", "--format", "torch_dist"]),
        Case("torch_dist-torch", ["reshard", dist, "--tp", "1", "--pp", "8", "--format", "torch"]),
    ]  # fmt: skip
    for case in made:
        dst = work / case.name
        started = time.monotonic()
        subprocess.run(command(case.arguments, dst), check=True, capture_output=True)
        case.seconds = time.monotonic() - started
        case.expected = tree(dst)
        case.nbytes = sum(file.stat().st_size for file in dst.rglob("*") if file.is_file())
        case.files = sum(file.endswith((".pt", ".distcp", ".safetensors")) for file in case.expected)
    return made


@dataclass
class Outcome:
    """What a run was like: its state after the signal, how many files the next one kept, and what was wrong."""

    state: str
    code: int | None
    kept: int
    wrong: list[str]


def write_old(dst: Path) -> Tree:
    """A directory that --overwrite is to replace."""
    for name, data in OLD.items():
        (dst / name).parent.mkdir(parents=True, exist_ok=True)
        (dst / name).write_bytes(data)
    return tree(dst)


def state_of(dst: Path, case: Case, old: Tree) -> str:
    """What DST is: absent, old, new, or incomplete; replacing where the old one is aside."""
    if not dst.exists():
        aside = stage_of(dst) / "replaced"
        return "absent" if not old else "replacing" if aside.is_dir() and tree(aside) == old else "lost"
    found = tree(dst)
    return "new" if found == case.expected else "old" if old and found == old else "incomplete"


def stage_of(dst: Path) -> Path:
    """Where a run keeps what it has finished."""
    return dst.parent / f".{dst.name}.shardtool"


def finished(dst: Path) -> int:
    """The number of files that the journal has."""
    journal = stage_of(dst) / "journal-0.jsonl"
    return journal.read_bytes().count(b'{"file":') if journal.exists() else 0


def check_again(dst: Path, case: Case, outcome: Outcome, *, overwrite: bool) -> Outcome:
    """The same command again: the same bytes as undisturbed, and nothing else."""
    had = finished(dst)
    again = subprocess.run(
        command(case.arguments, dst, overwrite=overwrite), capture_output=True, text=True, check=False
    )
    there = outcome.state == "new" and not overwrite
    if there and (again.returncode != 2 or "the target exists" not in again.stderr):
        outcome.wrong.append(f"a DST that is complete: exit {again.returncode}, {again.stderr.strip()}")
    if not there and again.returncode:
        outcome.wrong.append(f"the next run: exit {again.returncode}, {again.stderr.strip()}")
    if had and outcome.state in ("absent", "old", "replacing"):
        outcome.kept = int(again.stderr.partition("continuing: ")[2].partition(" ")[0] or 0)
        if not had - 1 <= outcome.kept <= had:  # the last line of the journal may have been cut
            outcome.wrong.append(f"{had} files in the journal, {outcome.kept} kept: {again.stderr.strip()}")
    if state_of(dst, case, {}) != "new":
        outcome.wrong.append("the next run gave other bytes")
    if stage_of(dst).exists():
        outcome.wrong.append("a stage was left behind")
    return outcome


def wait_for_the_moment(process: subprocess.Popen[str], case: Case, dst: Path, rng: random.Random) -> None:
    """Return at a random moment of a run: by the clock, or some milliseconds after its nth file is finished."""
    if rng.random() < 0.3:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.1, 1.1) * case.seconds)
        return
    files = rng.randrange(case.files + 1)
    while process.poll() is None and finished(dst) < files:
        time.sleep(0.001)
    time.sleep(rng.choice([0, 0.001, 0.01, 0.05]) * rng.random())


def disturbed(case: Case, dst: Path, rng: random.Random, how: signal.Signals) -> Outcome:
    """One run with a signal at a random moment (sometimes a second one in the next run), and the run after it."""
    overwrite = rng.random() < 0.4
    old = write_old(dst) if overwrite else {}
    wrong: list[str] = []
    state, code = "", None
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background jobs have it ignored, and inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in range(2 if rng.random() < 0.3 else 1):
        process = subprocess.Popen(
            command(case.arguments, dst, overwrite=overwrite),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_the_moment(process, case, dst, rng)
        process.send_signal(how)
        _, said = process.communicate()
        state, code = state_of(dst, case, old), process.returncode
        if state in ("incomplete", "lost"):
            wrong.append(f"DST is {state} after {how.name}")
        # while it starts and after its last line the interpreter itself answers; while it imports, no DST is known yet
        alone = code == -signal.SIGINT or ("KeyboardInterrupt" in said and "shardtool/" not in said)
        ours = not alone and said != "interrupted\n"
        if how == signal.SIGINT and ours and code != 130 and state != "new":
            wrong.append(f"exit {code}: {said.strip()}")
        if how == signal.SIGINT and ours and (finished(dst) > 0) != ("the same command continues" in said):
            wrong.append(f"{finished(dst)} files finished, and the word is: {said.strip()}")
        if state == "new":
            break
    return check_again(dst, case, Outcome(state, code, 0, wrong), overwrite=overwrite)


def limited(case: Case, dst: Path, rng: random.Random) -> Outcome:
    """One run that may write no file beyond a size, as a quota would have it, and the run after it."""
    largest = case.nbytes // 20 + rng.randrange(case.nbytes // 8)
    run = subprocess.run(
        command(case.arguments, dst), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )  # fmt: skip
    return _refused(case, dst, run.returncode, run.stderr)


def _refused(case: Case, dst: Path, code: int, said: str) -> Outcome:
    state = state_of(dst, case, {})
    wrong = [] if state in ("absent", "new") else [f"DST is {state}"]
    if state == "absent" and (code != 2 or said.count("error: ") != 1 or "hint: " not in said or "Traceback" in said):
        wrong.append(f"exit {code}: {said.strip()}")
    return check_again(dst, case, Outcome(state, code, 0, wrong), overwrite=False)


@contextlib.contextmanager
def small_disk(size: int, kind: str) -> Iterator[Path]:
    """A file system of about `size` bytes: tmpfs, or ext2 in an image (which cannot reserve room). Needs root."""
    with tempfile.TemporaryDirectory(prefix="shardtool-disk-") as name:
        where = Path(name, "disk")
        where.mkdir()
        if kind == "tmpfs":
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], check=True, capture_output=True
            )
        else:
            image = Path(name, "image")
            with image.open("wb") as file:
                file.truncate(size)
            subprocess.run(["mkfs.ext2", "-q", "-m", "0", image], check=True, capture_output=True)
            subprocess.run(["mount", "-o", "loop", image, where], check=True, capture_output=True)
        try:
            yield where
        finally:
            subprocess.run(["umount", where], check=True)


def filled(case: Case, rng: random.Random, kind: str) -> Outcome:
    """One run on a disk with too little room, or that something else fills up meanwhile; then the run with room."""
    with small_disk(int(case.nbytes * 1.15) + (8 << 20), kind) as disk:
        stop = threading.Event()
        filler = disk / "filler"

        def fill() -> None:
            time.sleep(rng.uniform(0, case.seconds))
            with filler.open("wb") as file, contextlib.suppress(OSError):
                while not stop.is_set():
                    file.write(bytes(1 << 20))
                    file.flush()

        thread = threading.Thread(target=fill)
        thread.start()
        run = subprocess.run(command(case.arguments, disk / "dst"), capture_output=True, text=True, check=False)
        stop.set()
        thread.join()
        filler.unlink()
        return _refused(case, disk / "dst", run.returncode, run.stderr)


def disks() -> list[str]:
    """The kinds of small file systems that can be mounted here."""
    found = []
    for kind in ("tmpfs", "ext2"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError), small_disk(1 << 23, kind):
            found.append(kind)
    return found


def report(title: str, outcomes: list[tuple[Case, Outcome]]) -> int:
    """Print what came of the runs; the number of those that went wrong."""
    bad = [(case, outcome) for case, outcome in outcomes if outcome.wrong]
    ended = sum(outcome.code == 0 for _, outcome in outcomes)
    print(f"{title}: {len(outcomes) - ended} runs disturbed, {ended} had ended before; {len(bad)} went wrong")
    for name in dict.fromkeys(case.name for case, _ in outcomes):
        held = [outcome for case, outcome in outcomes if case.name == name]
        states = ", ".join(f"{state} {count}" for state, count in sorted(Counter(o.state for o in held).items()))
        kept = sum(outcome.kept > 0 for outcome in held)
        print(
            f"  {name:<18} {len(held):>4} runs; DST after it: {states}; {kept} continued with {sum(o.kept for o in held)} files"
        )
    codes = sorted(Counter(outcome.code for _, outcome in outcomes).items(), key=str)
    print("  exit codes: " + ", ".join(f"{code}: {count}" for code, count in codes))
    for case, outcome in bad:
        print(f"  WRONG {case.name}: {'; '.join(outcome.wrong)}")
    sys.stdout.flush()
    return len(bad)


def runs(work: Path, count: int, one: Callable[[Case, Path, random.Random], Outcome], seed: int, made: list[Case]):
    """`count` runs that were disturbed, the cases in turn; a run that had ended before is checked, and does not count."""
    number = disturbed = 0
    while disturbed < count:
        case = made[number % len(made)]
        with tempfile.TemporaryDirectory(dir=work, prefix="run-") as folder:
            outcome = one(case, Path(folder, "dst"), random.Random(seed * 1_000_003 + number))
        number += 1
        disturbed += outcome.code != 0
        yield case, outcome


def main() -> int:
    """The runs that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "INT", "full", "all"], default="all")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(dir=given.work, prefix="shardtool-kills-") as name:
        work = Path(name)
        made = cases(work)
        for how in (signal.SIGKILL, signal.SIGINT):
            if given.signal in (how.name[3:], "all"):
                one = lambda case, dst, rng, how=how: disturbed(case, dst, rng, how)  # noqa: E731 - one of three
                bad += report(how.name, list(runs(work, given.runs, one, given.seed, made)))
        if given.signal in ("full", "all"):
            count = max(1, given.runs // 10)
            bad += report("no file beyond a size (RLIMIT_FSIZE)", list(runs(work, count, limited, given.seed, made)))
            for kind in disks():
                one = lambda case, _, rng, kind=kind: filled(case, rng, kind)  # noqa: E731 - one of three
                bad += report(f"a full {kind}", list(runs(work, count, one, given.seed, made)))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
