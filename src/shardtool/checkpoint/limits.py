"""What one side of a conversion cannot hold of a model, although the tensors have their places: refused, or said."""

from __future__ import annotations

from shardtool.checkpoint.megatron import Megatron
from shardtool.checkpoint.structure import structure
from shardtool.errors import CheckpointError, UsageError
from shardtool.families.architecture import Architecture
from shardtool.families.family import RESHARD
from shardtool.layout.mesh import Chunk, Mesh


def version_notes(a: Architecture) -> tuple[str, ...]:
    """Where versions of megatron-core understand the same args and tensors differently."""
    if a.mla and a.mla.query_rank is None and a.qk_norm and not a.mla.query_norm:
        return (
            "for megatron-core 0.18 and older: 0.19 has one more norm before the query projection of this model"
            " (qk_layernorm without q_lora_rank), refuses this checkpoint as torch_dist and starts the norm at ones as torch",
        )
    return ()


def check_tied_mtp(form: str, mesh: Mesh, a: Architecture, model_chunks: tuple[Chunk, ...]) -> None:
    """UsageError where megatron-core's own sharded_state_dict fails (0.16.1 and newer), so that it could load nothing."""
    last = model_chunks[-1]
    if form == "torch_dist" and a.tied and a.mtp_layers and last.mtp and not last.embedding:
        raise UsageError(
            "megatron-core cannot load tied embeddings with multi-token prediction on the last of several stages",
            where="torch_dist (language_module.py, tie_embeddings_and_output_weights_state_dict)",
            expected="one pipeline stage, or the MTP layers in a stage before the loss's",
            found=f"pp {mesh.pp}",
            hint="use --format torch, --pp 1, or a --pipeline-layout such as 'Et|tm|L'",
        )


def check_exportable(source: Megatron) -> None:
    """Refuse what no Hugging Face model has; `reshard` carries it."""
    a = structure(source)
    reason = None
    if a.mla and a.mla.query_norm:
        reason = "a norm of its own before linear_q_proj (megatron-core 0.19 with qk_layernorm and no q_lora_rank)"
    elif source.architecture.mtp_repeats > 1:
        reason = f"one MTP layer that is applied {source.architecture.mtp_repeats} times (mtp_use_repeated_layer)"
    if reason:
        raise CheckpointError(
            "no Hugging Face architecture is this model", where=str(source.save.directory), found=f"it has {reason}",
            hint=RESHARD,
        )  # fmt: skip
