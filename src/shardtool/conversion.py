"""A conversion that has been prepared, and its execution: staged, journalled, committed, all of it or nothing.

Every direction is prepared elsewhere (`convert`, `translate`): headers read, layouts made, the plan checked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from shardtool.checkpoint.companions import Companions, companions
from shardtool.checkpoint.constants import constant_fills
from shardtool.checkpoint.identity import Identity, identify
from shardtool.checkpoint.opened import Opened
from shardtool.checkpoint.padding import cut_rows, padding_rows
from shardtool.checkpoint.target import Target, TargetTensor, Write
from shardtool.errors import CheckpointError, ShardtoolError
from shardtool.execute import engine, finite, reflink
from shardtool.execute.digests import Digests, Span, sha256
from shardtool.execute.lower import source_keys
from shardtool.execute.memory import Memory
from shardtool.execute.ranks import Ranks, shares
from shardtool.execute.staging import Stage, check_destination, recover, staged, write_made, write_small
from shardtool.families.architecture import Architecture
from shardtool.layout.layout import Key
from shardtool.manifest import MANIFEST, ManifestFile, command_line, listed, manifest_bytes, tensor_spans, versions
from shardtool.plan.copies import Plan
from shardtool.plan.plan import replicas

if TYPE_CHECKING:
    from shardtool.translate.verdict import Verdict


class Prepared(Struct, frozen=True):
    """A conversion that has passed every check and has written nothing yet."""

    direction: str
    source: Opened
    plan: Plan
    target: Target
    architecture: Architecture
    subdirectory: str  # of DST, for the tensors; "" is DST itself
    last: Mapping[str, bytes]  # small files of DST, written after everything else, in order
    companions: Path | None = None  # a Hugging Face directory whose tokenizer comes with it
    notes: tuple[str, ...] = ()
    dtypes: Mapping[int, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # as on the command line: all that shape the output
    verdict: Verdict | None = None  # of a translation: how exact it is

    @property
    def tensors(self) -> int:
        """Tensors to be written."""
        return len(self.target.places)


class Summary(Struct, frozen=True):
    """What a conversion did."""

    direction: str
    src: str
    dst: str
    tensors: int
    bytes_read: int
    bytes_written: int
    files: int
    seconds: float
    plan_digest: str
    ignored: int
    replicas_compared: int
    notes: tuple[str, ...]
    peak_memory: int  # bytes of anonymous memory, of all processes together
    processes: int
    files_kept: int  # that an earlier run of the same conversion had finished

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


def execute(
    prepared: Prepared,
    dst: Path,
    *,
    overwrite: bool = False,
    jobs: int = 2,
    progress: Callable[[int, str], None] | None = None,
    durable: bool = True,
    ranks: Ranks | None = None,
    checksums: bool = True,
    tensor_digests: bool = False,
    say: Callable[[str], None] = lambda _: None,
    allow_nan: bool = False,
) -> Summary:
    """Write a prepared conversion to DST: all of it, or nothing. What an earlier run of it has finished is kept.

    With `ranks` this process writes its share.

    Replicas in the source are compared with each other first; CheckpointError where they differ, and where the source
    changes meanwhile. Interrupted after Ctrl-C. Without `durable` nothing waits for the device, and a run that is cut
    off starts over. `checksums` and `tensor_digests` (of each target tensor) go into the manifest; `say` gets a line
    for people where an earlier run is continued, or is not.
    Values are looked at as they pass, without `checksums` only those that change on the way: CheckpointError where some
    are no numbers or do not fit the new dtype, with `allow_nan` a note.
    """
    started = time.monotonic()
    source = prepared.source
    ranks = ranks or Ranks({})
    if ranks.first:
        recover(dst, say)
    check_destination(source.path, dst, overwrite=overwrite)
    identity = identify(source)
    digest = prepared.plan.digest()
    spans = tensor_spans(prepared.target) if tensor_digests else {} if checksums else None
    made_of = [versions(), prepared.direction, digest, prepared.target.digest(), identity.key(), prepared.subdirectory]
    key = sha256(json.dumps([*made_of, checksums, tensor_digests, allow_nan]).encode())
    if progress is not None:
        ranks.on_progress = lambda count: progress(count, "other ranks")
    notes, kept = prepared.notes, 0
    odd = _NoNumbers(prepared, allow_nan)
    write = partial(_write, prepared, ranks=ranks, jobs=jobs, progress=progress, durable=durable, spans=spans, odd=odd)
    if not ranks.first:
        stage = Stage.join(Path(ranks.begin(digest)), prepared.subdirectory, ranks.rank)
        result = write(stage)
        stage.journal.close()
        ranks.report(result)
    else:
        notes += cut_rows(prepared.plan, source)
        with staged(dst, key, subdirectory=prepared.subdirectory, durable=durable, say=say) as stage:
            kept = len(stage.finished)
            if kept:
                say(f"continuing: {kept} of {len(prepared.target.skeletons)} files are finished")
            if prepared.options.get("reflink"):
                reflink.check(source.locate(next(iter(source.headers))).file, stage.output)
            else:
                stage.check_space(
                    sum(file.size for name, file in prepared.target.skeletons.items() if name not in stage.finished)
                )
            ranks.begin(digest, str(stage.directory))
            result = ranks.gather(write(stage))
            identity.check_unchanged()
            notes += odd.notes(result["odd"])
            if prepared.options.get("reflink") and not checksums and prepared.direction != "megatron2hf":
                notes += (NO_CRC,)
            notes += _write_last(prepared, stage, identity, digest, checksums)
        ranks.end()
    return Summary(
        prepared.direction, str(source.path), str(dst), prepared.tensors, result["read"], result["written"],
        len(prepared.target.skeletons), time.monotonic() - started, digest, len(source.ignored), result["compared"],
        notes, result["peak"], ranks.size, kept,
    )  # fmt: skip


def shareable(plan: Plan, tensors: Iterable[TargetTensor], source: Opened) -> dict[Key, int]:
    """Where payloads have to begin, modulo a block, to share blocks with the source (execute.reflink)."""
    dtypes = {tensor.key: tensor.dtype for tensor in tensors}
    return reflink.residues(engine.tasks(plan, dtypes.__getitem__), source.locate)


class _NoNumbers:
    """What becomes of target tensors that hold NaN or Inf: an error that tells where they come from, or a note."""

    def __init__(self, prepared: Prepared, allowed: bool) -> None:
        self._source, self._allowed = prepared.source, allowed
        self._held: dict[Key, engine.Task] = {}

    def tell(self, task: engine.Task) -> None:
        """For the engine's watch. Raises CheckpointError, which names the source's tensors, unless it is allowed."""
        if self._allowed:
            self._held[task.key] = task
        else:
            finite.refuse(self._found([task]), str(self._source.path), self._source.locate)

    def __len__(self) -> int:
        return len(self._held)

    def notes(self, total: int) -> tuple[str, ...]:
        """Lines for people; `total` counts the tensors of all ranks."""
        lines = finite.lines(self._found(self._held.values()))
        others = total - len(self._held)
        return (*lines, f"NaN or Inf in {others} tensors that other ranks have written") if others else lines

    def _found(self, tasks: Iterable[engine.Task]) -> list[finite.NotFinite]:
        """The source's tensors that are to blame; the target's own where the values are computed from sound ones."""
        found: dict[Key, finite.NotFinite] = {}
        for task in tasks:
            keys = dict.fromkeys(source_keys(task), task.dtype)
            blamed = finite.scan(keys, self._source.locate, keys, jobs=1)
            found |= {item.key: item for item in blamed}
            if not blamed:
                found[task.key] = finite.NotFinite(task.key, 0, 0, 0, prod(task.shape))
        return list(found.values())


def _write(
    prepared: Prepared,
    stage: Stage,
    *,
    ranks: Ranks,
    jobs: int,
    progress: Callable[[int, str], None] | None,
    durable: bool,
    spans: Mapping[str, Sequence[Span]] | None,
    odd: _NoNumbers,
) -> dict[str, int]:
    """Write this rank's share of the files that are not finished: bytes read and written, replica elements compared,
    peak memory. `spans` are what gets digests of its own in each file; None where nothing gets any.
    """
    source, target = prepared.source, prepared.target
    memory = Memory()
    compared = _compared(stage, source, ranks)
    work = []
    for task in engine.tasks(prepared.plan, lambda key: target.payload(key)[1].dtype):
        work.append((task, *target.payload(task.key)))
    fills = padding_rows(prepared.plan, source, work) | constant_fills(prepared.plan, target)
    skeletons = {name: skeleton for name, skeleton in target.skeletons.items() if name not in stage.finished}
    if ranks.size > 1:
        # files that take from the same part of the source go to the same rank: it is read once
        first = engine.first_places(work, source.locate, source.place)
        order = sorted(skeletons, key=lambda name: first.get(name, ("", 0)))
        of_rank = shares([(name, skeletons[name].size) for name in order], ranks.size)
        skeletons = {name: skeleton for name, skeleton in skeletons.items() if of_rank[name] == ranks.rank}

    def advance(count: int, file: str) -> None:
        memory.look()
        ranks.check()
        ranks.written += count
        if progress is not None:
            progress(count, file)

    if progress is not None:
        for name in stage.finished:
            progress(sum(payload.nbytes for payload in target.skeletons[name].payload.values()), name)
    digests = None if spans is None else Digests(spans, threads=jobs)
    share = bool(prepared.options.get("reflink"))
    files = engine.Files(stage.tensors, skeletons, durable=durable, digests=digests, finished=stage.add, share=share)
    try:
        traffic = engine.write(
            [item for item in work if item[1] in skeletons], files, source.locate,
            fills=fills, jobs=jobs, progress=advance, place=source.place,
            watch=engine.Watch(odd.tell, moved=spans is not None),
        )  # fmt: skip
        files.close(sync=True)
    except BaseException:
        files.close(sync=False)
        raise
    done = {"read": traffic.read, "written": traffic.written, "compared": compared}
    return done | {"peak": memory.look(), "odd": len(odd)}


def _compared(stage: Stage, source: Opened, ranks: Ranks) -> int:
    """Compare the source's replicas, unless an earlier run has done so: elements in this rank's share."""
    known = stage.journal.facts.get("replicas_compared")
    if known is not None:
        return int(known) if ranks.first else 0
    compared = _compare_replicas(source, ranks.rank, ranks.size)
    if ranks.size == 1:
        stage.journal.learned("replicas_compared", compared)
    return compared


def _write_last(
    prepared: Prepared, stage: Stage, identity: Identity, plan_digest: str, checksums: bool
) -> tuple[str, ...]:
    """Write what comes after the tensors: metadata, tokenizer, the manifest, and config or tracker. Returns what is to
    be said of it.
    """
    carried = Companions()
    if prepared.companions is not None:
        carried = companions(prepared.companions, prepared.last.get("config.json", b"{}"))
    below = f"{prepared.subdirectory}/" if prepared.subdirectory else ""
    files = {below + name: listed(record, prepared.target) for name, record in stage.records().items()}
    if lacking := [name for name in prepared.target.skeletons if below + name not in files]:
        raise ShardtoolError(
            "files were not finished",
            where=str(stage.output),
            details=tuple(lacking[:20]),
            hint="this is a bug in shardtool: report it with the output of `shardtool --debug ...`",
        )

    def put(name: str, make: Callable[[Write], object]) -> None:
        size, digest = write_made(stage.output / name, make)
        files[name] = ManifestFile(size, digest if checksums else "")

    for name, make in prepared.target.last.items():
        put(below + name, make)
    for name, data in carried.files.items():
        put(below + name, partial(_whole, data))
    files |= {name: ManifestFile(len(data), sha256(data) if checksums else "") for name, data in prepared.last.items()}
    command = command_line(prepared.direction, str(identity.path), prepared.options)
    verdict = prepared.verdict.as_dict() if prepared.verdict else None
    write_small(stage.output / MANIFEST, manifest_bytes(command, plan_digest, identity.as_dict(), files, verdict))
    for name, data in prepared.last.items():
        put(name, partial(_whole, data))
    return ((f"carried over: {', '.join(carried.files)}",) if carried.files else ()) + carried.notes


def _whole(data: bytes, write: Write) -> None:
    write(data)


NO_CRC = (
    "nothing was read of what is shared, so that the archives have no CRC32 there: torch and Megatron load them, "
    "`unzip -t` finds them damaged"
)
DIVERGED = "the ranks are not of one save, or a rank diverged during training"
APART = (
    "training moves embedding and head apart, which are two tensors in Megatron: give --hf a config.json with "
    "tie_word_embeddings false"
)
NOT_TIED = (
    "correct tie_word_embeddings in config.json, or remove the head from the files if the model has none of its own"
)


def _compare_replicas(source: Opened, rank: int = 0, size: int = 1) -> int:
    """Compare what the source holds more than once; the number of elements compared (in this rank's share)."""
    twins = replicas(source.layout)
    if twins is None:
        return 0
    compared, differences = engine.compare(twins, source.locate, source.locate, share=(rank, size))
    if differences:
        lines = [
            f"{item.key[1]} in {item.key[0] or source.path}: {item.elements} of {item.total} elements differ"
            for item in differences
        ]
        on_disk = (source.path / "config.json").is_file()  # Hugging Face: a head beside the embedding that it is
        hint = APART if any(rule.derived for rule in source.layout.rules) else DIVERGED
        raise CheckpointError(
            "copies of the same weights differ",
            where=str(source.path),
            expected="a head that is bit-identical to the embedding"
            if on_disk
            else "bit-identical replicas (norms over tp, tied embeddings over pp)",
            details=tuple(lines[:20]),
            hint=NOT_TIED if on_disk else hint,
        )
    return compared
