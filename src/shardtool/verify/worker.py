"""One tensor parallel rank of megatron-core on the CPU: `python -m shardtool.verify.worker FD RANK TP STORE`.

Started by shardtool.verify.pool. Serves jobs from the socket until it is closed. Stages run one after the other: build,
load, run all prompts, keep the hidden states, delete; so the memory is that of one stage.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from shardtool.errors import CheckpointError, ShardtoolError, UsageError, too_few_rows
from shardtool.layout.mesh import Chunk, chunks
from shardtool.verify import shims
from shardtool.verify.pool import DEFAULT_TIMEOUT, Job, Reply

shims.apply()  # before megatron-core's other modules take the names by value

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402

from shardtool.verify.megatron_load import EMBEDDING, load_stage, stored_embedding  # noqa: E402
from shardtool.verify.megatron_model import build_stage, expert_tp  # noqa: E402


class _Traces:
    """Hidden states at the traced positions: after the embedding (0), layer i - 1 (i), the final norm (-1).

    And the experts that some token was sent to, per expert layer.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.prompt = 0
        self.points: list[list[torch.Tensor]] = [[] for _ in range(job.architecture.num_layers + 1)]
        self.chosen: dict[int, torch.Tensor] = {}

    def keep(self, point: int, hidden: torch.Tensor) -> None:
        """Keep the traced rows of a hidden state [positions, 1, hidden]."""
        self.points[point].append(hidden[list(self.job.traced[self.prompt]), 0].float())

    def attach(self, model: GPTModel, chunk: Chunk) -> None:
        """Have the modules of a stage report here."""

        def hook(point: int) -> Callable[..., None]:
            def keep(_module: object, _inputs: object, output: Any) -> None:
                self.keep(point, output[0] if isinstance(output, tuple) else output)

            return keep

        def count(layer: int) -> Callable[..., None]:
            def keep(
                _module: object, _inputs: object, output: Any
            ) -> None:  # (probabilities, which experts), per token
                used = output[1].bool().flatten(0, -2).any(dim=0)
                self.chosen[layer] = used | self.chosen.get(layer, torch.zeros_like(used))

            return keep

        if chunk.embedding:
            model.embedding.register_forward_hook(hook(0))
        for layer, index in zip(model.decoder.layers, chunk.layers, strict=True):
            if index + 1 < self.job.architecture.num_layers:  # the last one counts after the final norm
                layer.register_forward_hook(hook(index + 1))
            if (router := getattr(layer.mlp, "router", None)) is not None:
                router.register_forward_hook(count(index))
        if chunk.head:
            model.decoder.final_layernorm.register_forward_hook(hook(-1))

    def stacked(self) -> torch.Tensor:
        """[points, traced positions of all prompts, hidden]"""
        return torch.stack([torch.cat(point) for point in self.points])

    def experts(self) -> torch.Tensor:
        """[expert layers, experts]: whether some token was sent there."""
        return torch.stack(list(self.chosen.values())) if self.chosen else torch.zeros(0, 0, dtype=torch.bool)


@torch.inference_mode()
def _run_stage(
    model: GPTModel, chunk: Chunk, job: Job, streams: list[torch.Tensor], traces: _Traces
) -> list[torch.Tensor]:
    """The stage's output for each prompt: hidden states [positions, 1, hidden], or logits [positions, vocabulary]."""
    results = []
    for index, prompt in enumerate(job.prompts):
        traces.prompt = index
        if not chunk.embedding:
            model.set_input_tensor(streams[index])
        ids = torch.tensor([prompt])
        output = model(input_ids=ids, position_ids=torch.arange(len(prompt))[None], attention_mask=None)
        results.append(output[0, :, : job.architecture.vocab_size].float() if chunk.head else output)
    return results


def _add_one(model: GPTModel) -> None:
    """Norms stored as gamma - 1 become gamma: the local spec's norms know no other form."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("norm.weight"):
                value.add_(1)


def _together(action: Callable[[], None]) -> None:
    """Run a rank's own work; when it fails on any rank, fail on all, so that nobody waits in a collective."""
    mine: ShardtoolError | None = None
    try:
        action()
    except ShardtoolError as error:
        mine = _portable(error)
    found: list[ShardtoolError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    if (first := next((error for error in found if error is not None), None)) is not None:
        raise first


def _groups(tp: int, etp: int) -> None:
    """The process groups of a world of `tp` ranks whose experts are split over `etp`; kept while they fit."""
    if parallel_state.is_initialized():
        if parallel_state.get_expert_tensor_parallel_world_size() == etp:
            return
        parallel_state.destroy_model_parallel()
        # it forgets its groups and leaves their threads running, a few dozen each time
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                torch.distributed.destroy_process_group(group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_tensor_parallel_size=etp, create_gloo_process_groups=False
    )


def run(job: Job) -> None:
    """Run a job in this rank. Raises ShardtoolError on all ranks alike."""
    mesh, dtype = job.mesh, getattr(torch, job.dtype)
    _groups(mesh.tp, expert_tp(job.architecture, mesh))
    vocab = 0

    def measure() -> None:
        nonlocal vocab
        stored, _ = stored_embedding(job.directory, mesh)
        if stored < job.architecture.vocab_size:
            raise too_few_rows(f"{job.directory}: {EMBEDDING}", job.architecture.vocab_size, stored)
        vocab = -(-stored // mesh.tp) * mesh.tp

    _together(measure)
    traces = _Traces(job)
    streams: list[torch.Tensor] = []
    for chunk in chunks(mesh, job.architecture.num_layers, job.architecture.mtp_depth):
        model = build_stage(job.architecture, mesh, chunk, dtype, vocab)
        _together(lambda model=model, chunk=chunk: load_stage(model, job.directory, mesh, chunk))  # type: ignore[misc]
        if job.architecture.centred_norms:
            _add_one(model)
        traces.attach(model, chunk)
        streams = _run_stage(model, chunk, job, streams, traces)
        del model
        gc.collect()
    if torch.distributed.get_rank() == 0:
        torch.save({"logits": torch.cat(streams), "hidden": traces.stacked(), "experts": traces.experts()}, job.output)


def _portable(error: ShardtoolError) -> ShardtoolError:
    """The error without its cause, which may not pickle."""
    kind = UsageError if isinstance(error, UsageError) else CheckpointError
    fields = {name: getattr(error, name) for name in ("where", "expected", "found", "hint", "details")}
    return kind(error.what, **fields)


def _answer(job: Job) -> Reply:
    try:
        run(job)
    except ShardtoolError as error:
        return Reply(_portable(error))
    except Exception as error:  # whatever megatron-core raises in the middle of a collective
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Reply(
            CheckpointError(
                "megatron-core failed",
                where=f"{last.filename}:{last.lineno}",
                found=f"{type(error).__name__}: {error}",
                hint="the traceback is on stderr with --debug; `verify --level exact` compares the weights",
            ),
            broken=True,
        )
    return Reply()


def main(arguments: list[str]) -> None:
    """Join the group, then serve jobs until the parent closes the connection."""
    fd, rank, tp, store = int(arguments[0]), int(arguments[1]), int(arguments[2]), arguments[3]
    connection = Connection(fd)
    torch.set_num_interop_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, tp),  # type: ignore[attr-defined]
        rank=rank,
        world_size=tp,
        timeout=timedelta(seconds=DEFAULT_TIMEOUT),
    )
    _groups(tp, tp)
    # what the imports left on the heap stays for good: no collection between the stages has to walk over it
    gc.collect()
    gc.freeze()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_answer(job))


if __name__ == "__main__":
    main(sys.argv[1:])
