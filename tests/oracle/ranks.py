"""Ranks of a real Megatron-LM run on the CPU: `python ranks.py RANK WORLD STORE TASKS`, one process per rank.

Unlike verify's workers these are all ranks of the layout at once, with gloo between them: pipeline stages send their
hidden states to each other, `dist_checkpointing.save` and `load` run as in training, with everything at its default.
Nothing of shardtool's formats or layouts is used. TASKS is a torch file with a list of Task.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from shardtool.families.architecture import Architecture
from shardtool.layout.mesh import Mesh

VOCAB_DIVISIBLE_BY = 128
ITERATION = 100


@dataclass(frozen=True)
class Task:
    """Save a random model (`save`), or load a checkpoint (`load`), in a layout; then its logits of `ids` to `logits`.

    Save: the model goes to PATH/torch and PATH/torch_dist, and if that is there to PATH/singleton: torch_dist with
    singleton_local_shards. Load: PATH is a checkpoint's save directory.
    """

    kind: str  # "save", "load_torch_dist" or "load_torch"
    architecture: Architecture
    mesh: Mesh
    path: Path
    logits: Path
    ids: tuple[tuple[int, ...], ...]


def padded(a: Architecture, tp: int) -> int:
    """Rows of the embedding, as megatron/training/arguments.py pads the vocabulary."""
    multiple = VOCAB_DIVISIBLE_BY * tp
    return (a.vocab_size + multiple - 1) // multiple * multiple


def rank_directory(save: Path, mesh: Mesh, tp: int, pp: int) -> Path:
    """megatron/training/checkpointing.py, get_checkpoint_name."""
    return save / (f"mp_rank_{tp:02d}" if mesh.pp == 1 else f"mp_rank_{tp:02d}_{pp:03d}")


def launch_args(a: Architecture, mesh: Mesh, form: str) -> Namespace:
    """The args of the run, as far as they say what the model is."""
    scaling = a.rope.scaling if a.rope else None
    return Namespace(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_size,
        num_attention_heads=a.num_heads,
        group_query_attention=a.num_query_groups != a.num_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.head_dim,
        max_position_embeddings=a.max_positions,
        seq_length=32,
        position_embedding_type="rope" if a.rope else "learned_absolute",
        use_rotary_position_embeddings=False,
        rotary_base=int(a.rope.theta) if a.rope else 10000,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=8.0,
        swiglu=a.gated,
        add_bias_linear=a.linear_bias,
        add_qkv_bias=a.qkv_bias,
        bias_gelu_fusion=a.linear_bias,
        normalization="RMSNorm" if a.norm == "rms" else "LayerNorm",
        norm_epsilon=a.norm_eps,
        qk_layernorm=a.qk_norm,
        window_size=None if a.window is None else (a.window - 1, 0),
        untie_embeddings_and_output_weights=not a.tied,
        vocab_size=a.vocab_size,
        padded_vocab_size=padded(a, mesh.tp),
        make_vocab_size_divisible_by=VOCAB_DIVISIBLE_BY,
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        num_experts=a.moe.num_experts if a.moe else None,
        moe_router_topk=a.moe.top_k if a.moe else 2,
        moe_ffn_hidden_size=a.moe.ffn_size if a.moe else None,
        moe_router_pre_softmax=False,
        moe_router_score_function="softmax",
        params_dtype=torch.float32,
        bf16=False,
        fp16=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        ckpt_format=form,
        world_size=mesh.tp * mesh.pp,
        data_parallel_size=1,
        transformer_impl="local",
        consumed_train_samples=6400,
        consumed_valid_samples=0,
        iteration=ITERATION,
    )


def positions(a: Architecture) -> dict[str, Any]:
    """The arguments of GPTModel that say how positions enter."""
    if a.rope is None:
        return {"position_embedding_type": "learned_absolute"}
    factor = a.rope.scaling.factor if a.rope.scaling else 8.0
    return {
        "position_embedding_type": "rope",
        "rotary_base": int(a.rope.theta),
        "rope_scaling": a.rope.scaling is not None,
        "rope_scaling_factor": factor,
    }


def main(rank: int, world: int, store: str, tasks: list[Task]) -> None:
    from shardtool.verify import shims

    shims.apply()
    # beside what a forward pass needs: saving waits for the device, and a tied head is moved to it
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.safe_globals import register_safe_globals

    from shardtool.verify.megatron_model import transformer_config

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    register_safe_globals()
    split = (
        "word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight",
        "linear_fc1.bias", "linear_proj.weight", "linear_fc2.weight",
    )  # fmt: skip

    def build(a: Architecture, mesh: Mesh) -> GPTModel:
        config = transformer_config(a, mesh, torch.float32)
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        model = GPTModel(
            config,
            spec,
            vocab_size=padded(a, mesh.tp),
            max_sequence_length=a.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=False,
            share_embeddings_and_output_weights=a.tied,
            **positions(a),
        )
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        return model.eval()

    def initialise(model: GPTModel, a: Architecture) -> None:
        """Noise that depends on a parameter's global name and its shard, so that replicas are equal."""
        first = model.decoder.layers[0].layer_number - 1
        for key, parameter in model.named_parameters():
            parts = key.split(".")
            if key.startswith("decoder.layers."):
                parts[2] = str(int(parts[2]) + first)
            name = ".".join(parts)
            if a.tied and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            if name.endswith(split):
                name += f" {parallel_state.get_tensor_model_parallel_rank()}"
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(crc32(name.encode())))
            is_norm = "layernorm.weight" in name
            parameter.data.copy_(1 + 0.2 * noise if is_norm else 0.1 * noise)

    @torch.no_grad()
    def forward(model: GPTModel, a: Architecture, ids: torch.Tensor) -> torch.Tensor | None:
        """The logits, on the last stage."""
        positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        if not model.pre_process:
            hidden = torch.empty(ids.shape[1], ids.shape[0], a.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(input_ids=ids, position_ids=positions, attention_mask=None)
        if model.post_process:
            return output[..., : a.vocab_size].contiguous()
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None

    def save(task: Task, model: GPTModel) -> None:
        a, mesh = task.architecture, task.mesh
        common = {"checkpoint_version": 3.0, "iteration": ITERATION}
        name = f"iter_{ITERATION:07d}"
        legacy, modern, singleton = (task.path / name for name in ("torch", "torch_dist", "singleton"))
        place = rank_directory(
            legacy / name, mesh, parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )  # fmt: skip
        place.mkdir(parents=True)
        state = {"args": launch_args(a, mesh, "torch"), **common, "model": model.state_dict_for_save_checkpoint()}
        torch.save(state, place / "model_optim_rng.pt")
        if rank == 0:
            for root in (legacy, modern, *([singleton] if singleton.is_dir() else [])):
                (root / name).mkdir(parents=True, exist_ok=True)
                (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        dist.barrier()
        for root in (modern, *([singleton] if singleton.is_dir() else [])):
            metadata = {"singleton_local_shards": root == singleton, "chained_optim_avoid_prefix": True}
            sharded = {
                "args": launch_args(a, mesh, "torch_dist"), **common, **model.sharded_state_dict(metadata=metadata)
            }  # fmt: skip
            dist_checkpointing.save(sharded, str(root / name), content_metadata=metadata)

    def load(task: Task, model: GPTModel) -> None:
        if task.kind == "load_torch":
            place = rank_directory(
                task.path, task.mesh, parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
            )  # fmt: skip
            state = torch.load(place / "model_optim_rng.pt", map_location="cpu", weights_only=True)
            assert isinstance(state["args"], Namespace)
            assert state["checkpoint_version"] == 3.0
            model.load_state_dict(state["model"], strict=True)
            return
        content = dist_checkpointing.load_content_metadata(str(task.path))
        state = dist_checkpointing.load(model.sharded_state_dict(metadata=content), str(task.path))
        assert isinstance(state.pop("args"), Namespace)
        model.load_state_dict({key: value for key, value in state.items() if "." in key}, strict=True)

    for task in tasks:
        mesh = task.mesh
        parallel_state.initialize_model_parallel(mesh.tp, mesh.pp, create_gloo_process_groups=False)
        model = build(task.architecture, mesh)
        if task.kind == "save":
            initialise(model, task.architecture)
            save(task, model)
        else:
            load(task, model)
        logits = forward(model, task.architecture, torch.tensor(task.ids))
        one = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_data_parallel_rank() == 0
        if logits is not None and one:
            torch.save(logits, task.logits)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    # pickled from the module's importable name, hence not __main__'s classes
    import ranks

    ranks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], torch.load(sys.argv[4], weights_only=False))
