"""The parallel layout: tensor, pipeline, virtual pipeline and expert parallel sizes, and each model chunk's layers.

The split rules are megatron-core's (0.16.1 transformer/transformer_block.py `get_num_layers_to_build`,
transformer/pipeline_parallel_layer_layout.py): model chunks take consecutive layers in the order
(virtual stage, pipeline stage).
"""

from __future__ import annotations

import re

from msgspec import Struct

from shardtool.errors import UsageError


class Mesh(Struct, frozen=True):
    """Parallel sizes. `etp` None means the same as `tp`, megatron-core's default."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    account_for_embedding: bool = False
    account_for_loss: bool = False
    pipeline_layout: str | None = None

    @property
    def expert_tp(self) -> int:
        """The tensor parallel size of the experts."""
        return self.tp if self.etp is None else self.etp


class Chunk(Struct, frozen=True):
    """One model chunk: pipeline stage `pp`, virtual stage `vpp`, the global ids of its `layers` in order."""

    pp: int
    vpp: int
    layers: tuple[int, ...]
    embedding: bool  # holds the input embedding
    head: bool  # holds the final norm and the output layer
    mtp: bool = False  # holds the multi-token-prediction layers


def chunks(mesh: Mesh, num_layers: int, mtp_layers: int = 0) -> tuple[Chunk, ...]:
    """The model chunks in execution order (virtual stage, then pipeline stage).

    Raises UsageError where megatron-core would refuse the split.
    """
    for name in ("tp", "pp", "vpp", "ep"):
        if getattr(mesh, name) < 1:
            raise UsageError(f"--{name} must be at least 1", found=str(getattr(mesh, name)), hint="give 1 or more")
    if mesh.pipeline_layout is not None:
        return _from_layout_string(mesh, num_layers, mtp_layers)
    if mesh.vpp > 1 and mesh.pp == 1:
        raise UsageError(
            "virtual stages need more than one pipeline stage",
            found=f"--vpp {mesh.vpp}, pp 1",
            hint="give --pp 2 or more, or leave out --vpp",
        )
    counts = _counts(mesh, num_layers)
    result, start = [], 0
    last = (mesh.vpp - 1, mesh.pp - 1)
    for vpp in range(mesh.vpp):
        for pp in range(mesh.pp):
            count = counts[pp] // mesh.vpp
            count -= mesh.account_for_embedding and (vpp, pp) == (0, 0)
            count -= mesh.account_for_loss and (vpp, pp) == last
            if count < 0:
                raise UsageError(
                    "a pipeline stage would have less than no layers",
                    where=f"stage {pp}, chunk {vpp}",
                    hint="choose a smaller --pp or --vpp, or do not account for embedding and loss",
                )
            layers = tuple(range(start, start + count))
            start += count
            at_end = (vpp, pp) == last
            result.append(Chunk(pp, vpp, layers, (vpp, pp) == (0, 0), at_end, at_end and mtp_layers > 0))
    return tuple(result)


def _counts(mesh: Mesh, num_layers: int) -> list[int]:
    """Layers of each pipeline stage, over all its virtual stages; embedding and loss counted in where accounted for."""
    uneven = mesh.first_stage_layers is not None or mesh.last_stage_layers is not None
    accounted = mesh.account_for_embedding + mesh.account_for_loss
    if uneven and accounted:
        raise UsageError(
            "first / last stage layer counts and account-for-embedding / -loss exclude each other",
            hint="choose one of the two (megatron-core refuses both together)",
        )
    if uneven and mesh.pp == 1:
        raise UsageError(
            "first / last stage layer counts need more than one pipeline stage",
            found="pp 1",
            hint="give --pp 2 or more, or leave them out",
        )
    ends = {}
    if mesh.first_stage_layers is not None:
        ends[0] = mesh.first_stage_layers
    if mesh.last_stage_layers is not None:
        ends[mesh.pp - 1] = mesh.last_stage_layers
    if any(count < 1 for count in ends.values()):
        raise UsageError(
            "a first or last stage layer count must be at least 1", found=str(min(ends.values())), hint="give 1 or more"
        )
    if len(ends) == mesh.pp and mesh.vpp > 1:
        raise UsageError(
            "megatron-core cannot number the layers of two pipeline stages with both counts given and virtual stages",
            hint="leave out --last-stage-layers: it follows from the first",
        )
    rest, stages = num_layers + accounted - sum(ends.values()), mesh.pp - len(ends)
    # beside given ends there are middle stages with layers, or neither (megatron-core refuses the rest)
    if (stages and rest % stages) or rest < 0 or (ends and bool(rest) != bool(stages)):
        raise UsageError(
            f"{num_layers} layers do not divide over {mesh.pp} pipeline stages",
            expected=f"a multiple of {stages} layers for {stages} stages" if stages else "no layers left over",
            found=f"{rest} layers" + (" beside the given ones" if ends else ""),
            hint="choose another --pp, or give --first-stage-layers / --last-stage-layers / --pipeline-layout",
        )
    counts = [ends.get(pp, rest // stages if stages else 0) for pp in range(mesh.pp)]
    for pp, count in enumerate(counts):
        if count % mesh.vpp:
            raise UsageError(
                f"{count} layers of pipeline stage {pp} do not divide over {mesh.vpp} virtual stages",
                hint="choose another --vpp",
            )
    return counts


def parse_pipeline_layout(text: str) -> list[str]:
    """A layout string as a string of `E`, `t`, `m`, `L` per model chunk; `x*n`, `(..)*n` repeat, commas say nothing.

    Raises UsageError on any other character.
    """
    unrolled = text.replace(",", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"(.)\*(\d+)"):
        unrolled = re.sub(pattern, lambda m: m.group(1) * int(m.group(2)), unrolled)
    if stray := sorted(set(unrolled) - set("EtmL|")):
        raise UsageError(
            "the pipeline layout has an unknown letter",
            where=f"--pipeline-layout {text!r}",
            expected="E (embedding), t (transformer layer), m (MTP), L (loss), | between stages, x*n and (..)*n",
            found=" ".join(stray),
            hint="write a layout such as 'Et*3|(tt|)*6L'",
        )
    return unrolled.split("|")


def _from_layout_string(mesh: Mesh, num_layers: int, mtp_layers: int) -> tuple[Chunk, ...]:
    text = mesh.pipeline_layout or ""
    stages = parse_pipeline_layout(text)

    stages_here = "1 stage" if mesh.pp == 1 else f"{mesh.pp} stages"

    def refuse(what: str, expected: str, found: str) -> UsageError:
        hint = f"change the layout: the pipeline has {stages_here}, the model {num_layers} layers"
        return UsageError(what, where=f"--pipeline-layout {text!r}", expected=expected, found=found, hint=hint)

    uneven = mesh.first_stage_layers is not None or mesh.last_stage_layers is not None
    if uneven or mesh.account_for_embedding or mesh.account_for_loss:
        given = (
            ("--first-stage-layers", mesh.first_stage_layers is not None),
            ("--last-stage-layers", mesh.last_stage_layers is not None),
            ("--account-for-embedding", mesh.account_for_embedding),
            ("--account-for-loss", mesh.account_for_loss),
        )
        found = ", ".join(name for name, there in given if there)
        raise refuse("a pipeline layout says all about the split", "no other option of the split beside it", found)
    if len(stages) % mesh.pp:
        raise refuse("the layout's stages do not divide by pp", f"a multiple of {mesh.pp}", f"{len(stages)} stages")
    vpp = len(stages) // mesh.pp
    if vpp > 1 and mesh.pp == 1:
        raise refuse("virtual stages need more than one pipeline stage", "pp 2 or more", f"{vpp} stages for pp 1")
    if mesh.vpp not in (1, vpp):
        raise refuse("the layout gives another number of virtual stages", f"--vpp {vpp}", f"--vpp {mesh.vpp}")
    order = "".join(stages)
    for letter, name, count in (
        ("E", "embedding", 1),
        ("L", "loss", 1),
        ("t", "layer", num_layers),
        ("m", "MTP layer", mtp_layers),
    ):
        if order.count(letter) != count:
            raise refuse(f"the layout has a wrong number of {name}s", str(count), str(order.count(letter)))
    if not order.startswith("E") or not order.endswith("L"):
        raise refuse(
            "the layout must begin with the embedding and end with the loss", "E...L", order[:1] + ".." + order[-1:]
        )
    if re.search("m[^m|]*t", order):
        raise refuse("MTP layers come after all transformer layers", "t.. m.. L", "an m before a t")
    with_mtp = [index for index, stage in enumerate(stages) if "m" in stage]
    if with_mtp and (len(with_mtp) > 1 or with_mtp[0] < (vpp - 1) * mesh.pp):
        raise refuse(
            "all MTP layers sit in one stage of the last virtual stage", "one stage with m", f"stages {with_mtp}"
        )
    result, start = [], 0
    for index, stage in enumerate(stages):
        layers = tuple(range(start, start + stage.count("t")))
        start += len(layers)
        result.append(Chunk(index % mesh.pp, index // mesh.pp, layers, "E" in stage, "L" in stage, "m" in stage))
    return tuple(result)


def virtual_stages(mesh: Mesh) -> int:
    """The number of model chunks per pipeline stage; a pipeline layout string implies it."""
    return len(parse_pipeline_layout(mesh.pipeline_layout)) // mesh.pp if mesh.pipeline_layout is not None else mesh.vpp


def padded_vocab(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding in Megatron: the next multiple of `divisible_by * tp` (megatron/training/arguments.py)."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple
