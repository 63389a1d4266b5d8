"""A megatron-core model for an `Architecture`: its config, and one pipeline stage of it at a time.

Runs in a worker (shardtool.verify.worker), after shims.apply(). The world of a worker is the tensor parallel group
only; a pipeline stage believes in its place in the pipeline because it is told so twice: by a process group object
without any processes (megatron-core >= 0.16 asks the group), and by parallel_state's overrides (older code asks those).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from shardtool.errors import BUG, ShardtoolError, UsageError
from shardtool.families.architecture import Architecture, Rope
from shardtool.families.exactness import inexact
from shardtool.families.megatron_args_out import window_flags, yarn_args
from shardtool.layout.mesh import Chunk, Mesh, parse_pipeline_layout, virtual_stages

LLAMA3_CONSTANTS = (1.0, 4.0, 8192)  # low_freq_factor, high_freq_factor, original positions: rotary_pos_embedding.py

LEVELS = "`verify --level accounting --level exact` compares the weights"


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation. megatron-core says F.gelu for it and switches by bias_activation_fusion, silently."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "relu2": squared_relu,
    "quick_gelu": quick_gelu,
}  # fmt: skip


def transformer_config(arch: Architecture, mesh: Mesh, dtype: torch.dtype) -> TransformerConfig:
    """The TransformerConfig that expresses `arch`, unfused, without dropout, on the CPU.

    Multi-token-prediction layers are left out: the main model's logits do not depend on them. All experts are on every
    tensor parallel rank group (ep 1), whatever the checkpoint's layout.
    """
    vpp = virtual_stages(mesh)
    kind = TransformerConfig if arch.mla is None else MLATransformerConfig
    config = kind(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_query_groups,
        # the local attention sizes its output by kv_channels, which for latent attention is the values' size
        kv_channels=arch.head_dim if arch.mla is None else arch.mla.value_dim,
        ffn_hidden_size=arch.ffn_size,
        normalization={"rms": "RMSNorm", "layer": "LayerNorm"}[arch.norm],
        layernorm_epsilon=arch.norm_eps,
        activation_func=ACTIVATIONS[arch.activation],
        gated_linear_unit=arch.gated,
        glu_linear_offset=arch.glu_offset,
        activation_func_clamp_value=arch.clamp,
        softmax_type="learnable" if arch.sinks else "vanilla",
        add_bias_linear=arch.linear_bias,
        add_qkv_bias=arch.qkv_bias or arch.linear_bias,
        qk_layernorm=arch.qk_norm,
        softmax_scale=arch.softmax_scale,
        rotary_interleaved=arch.rope is not None and arch.rope.interleaved,
        # W visible tokens are the token itself and W - 1 before it
        window_size=None if arch.window is None else (arch.window - 1, 0),
        window_attn_skip_freq=window_flags(arch),
        no_rope_freq=[int(layer in arch.no_rope_layers) for layer in range(arch.num_layers)]
        if arch.no_rope_layers
        else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,  # as transformers' eager attention does
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        num_layers_in_first_pipeline_stage=mesh.first_stage_layers,
        num_layers_in_last_pipeline_stage=mesh.last_stage_layers,
        account_for_embedding_in_pipeline_split=mesh.account_for_embedding,
        account_for_loss_in_pipeline_split=mesh.account_for_loss,
        pipeline_model_parallel_layout=_layout_without_mtp(mesh.pipeline_layout),
        expert_tensor_parallel_size=expert_tp(arch, mesh),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=True,
        perform_initialization=False,  # every weight comes from the checkpoint, or the load fails
        attention_output_gate=arch.output_gate,
        **_moe_arguments(arch),
        **_mla_arguments(arch),
        **_linear_arguments(arch),
    )
    for name, value in yarn_args(arch).items():
        if name.startswith("yarn_"):  # GPTModel looks for these in the config, which has no fields for them
            setattr(config, name, value)
    return config


def expert_tp(arch: Architecture, mesh: Mesh) -> int:
    """The expert tensor parallel size of the model that is built: the checkpoint's where it divides tp.

    Otherwise that of the dense layers; megatron_load then cuts the experts anew.
    """
    return mesh.expert_tp if arch.moe is not None and mesh.tp % mesh.expert_tp == 0 else mesh.tp


def _layout_without_mtp(layout: str | None) -> str | None:
    return None if layout is None else "|".join(parse_pipeline_layout(layout)).replace("m", "")


def _moe_arguments(arch: Architecture) -> dict[str, Any]:
    """What TransformerConfig says of experts. Nothing here drops tokens, balances them or fuses kernels."""
    moe = arch.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": 1 if arch.uniform else [int(layer in moe.layers) for layer in range(arch.num_layers)],
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score,
        "moe_router_pre_softmax": moe.pre_softmax,
        "moe_router_topk_scaling_factor": moe.scaling,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_num_groups": moe.groups,
        "moe_router_group_topk": moe.group_top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_token_dispatcher_type": "allgather",  # the other one makes a CUDA stream
        "moe_grouped_gemm": False,
    }


def _rope_in_words(rope: Rope) -> str:
    pairs = "rope on neighbouring dims" if rope.interleaved else "rope"
    return f"{pairs}, {rope.scaling.kind if rope.scaling else 'plain'}"


def _mla_arguments(arch: Architecture) -> dict[str, Any]:
    """What MLATransformerConfig says beside TransformerConfig. Its defaults are DeepSeek's, so all are given."""
    mla = arch.mla
    if mla is None:
        return {}
    rope = arch.rope
    if rope is None or rope.interleaved or (rope.scaling is not None and rope.scaling.kind != "yarn"):
        raise UsageError(
            "megatron-core cannot express these positions with latent attention", expected="rope, plain or yarn",
            found="no rope" if rope is None else _rope_in_words(rope),
            hint=LEVELS,
        )  # fmt: skip
    arguments: dict[str, Any] = {
        "q_lora_rank": mla.query_rank,
        "kv_lora_rank": mla.key_value_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "rotary_base": rope.theta,
        "rotary_percent": rope.fraction,
    }
    yarn = rope.scaling
    if yarn is None:  # the factor scales the softmax whatever the type is
        return {**arguments, "rope_type": "rope", "rotary_scaling_factor": 1.0}
    if not yarn.truncate:
        raise UsageError(
            "megatron-core's latent attention rounds yarn's correction range", expected="truncate", hint=LEVELS
        )
    return {
        **arguments,
        "rope_type": "yarn",
        "rotary_scaling_factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def _linear_arguments(arch: Architecture) -> dict[str, Any]:
    """What TransformerConfig says of linear attention."""
    linear = arch.linear
    if linear is None:
        return {}
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(layer in linear.layers) for layer in range(arch.num_layers)],
        "linear_conv_kernel_dim": linear.kernel,
        "linear_key_head_dim": linear.key_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_num_key_heads": linear.key_heads,
        "linear_num_value_heads": linear.value_heads,
        "deterministic_mode": True,  # the delta rule in torch instead of a GPU kernel
    }


def _with_linear_attention(spec: Any, layers: tuple[int, ...], arch: Architecture) -> None:
    """Put a gated delta net into the layers of a stage that have it.

    megatron-core's own block spec for it (experimental_attention_variant_module_specs.py) is for Transformer Engine
    alone; the module itself is the same there, but for the norm before it, which is fused into its projection.
    """
    from megatron.core.models.backends import LocalSpecProvider  # noqa: PLC0415 - with linear attention only
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules  # noqa: PLC0415

    local: Any = LocalSpecProvider()
    attention = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=local.column_parallel_linear(),
            out_norm=local.layer_norm(rms_norm=arch.norm == "rms", for_qk=False),
            out_proj=local.row_parallel_linear(),
        ),
    )
    for at, layer in enumerate(layers):
        if layer in arch.linear_layers:
            spec.layer_specs[at] = copy.deepcopy(spec.layer_specs[at])
            spec.layer_specs[at].submodules.self_attention = attention


def _position_arguments(rope: Rope | None, *, latent: bool) -> dict[str, Any]:
    """The arguments of GPTModel that say how positions enter; latent attention takes its own from the config."""
    if latent:
        return {"position_embedding_type": "rope"}
    if rope is None:
        return {"position_embedding_type": "learned_absolute"}
    arguments: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": rope.theta,
        "rotary_percent": rope.fraction,
    }
    scaling = rope.scaling
    if scaling is None:
        return arguments
    if scaling.kind == "yarn":
        return {**arguments, "position_embedding_type": "yarn"}
    if scaling.kind == "linear":
        return {**arguments, "seq_len_interpolation_factor": scaling.factor}
    found = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
    if found != LLAMA3_CONSTANTS:
        raise UsageError(
            "megatron-core cannot express this rope scaling",
            expected="llama3 with low_freq_factor 1, high_freq_factor 4, original_max_position_embeddings 8192",
            found=", ".join(f"{value:g}" for value in found),
            hint="megatron-core has these three built in; only the factor is free",
        )
    return {**arguments, "rope_scaling": True, "rope_scaling_factor": scaling.factor}


def _stage_groups(mesh: Mesh, pp: int) -> ProcessGroupCollection:
    """The process groups of a rank in pipeline stage `pp`: the real ones, but for the pipeline."""
    parallel_state.set_pipeline_model_parallel_rank(pp)
    parallel_state.set_pipeline_model_parallel_world_size(mesh.pp)
    vpp = virtual_stages(
        mesh
    )  # a layout string is split by this, not by the config (pipeline_parallel_layer_layout.py)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp if vpp > 1 else None)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = torch.distributed.ProcessGroup(pp, mesh.pp)  # type: ignore[call-arg]  # the stub forgets this overload
    groups.embd = None  # the tied copy of the last stage is loaded from its own file, not reduced from the first
    return groups


def build_stage(arch: Architecture, mesh: Mesh, chunk: Chunk, dtype: torch.dtype, padded_vocab: int) -> GPTModel:
    """One model chunk with the local layer spec, as the tensor parallel rank of this process sees it, not initialised.

    Raises UsageError where megatron-core cannot express `arch` or the split, and when it would put other layers into
    this chunk than `chunk` says.
    """
    if reason := inexact(arch):
        raise UsageError(
            f"megatron-core computes another function from these weights: {reason}",
            hint=LEVELS,
        )
    vp_stage = chunk.vpp if virtual_stages(mesh) > 1 else None
    groups = _stage_groups(mesh, chunk.pp)
    try:
        config = transformer_config(arch, mesh, dtype)
        # The block spec names the final norm too; GPTModel would take Transformer Engine's where that is installed.
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization=config.normalization,
            vp_stage=vp_stage,
            pp_rank=chunk.pp,
        )
        if arch.linear is not None:
            _with_linear_attention(spec, chunk.layers, arch)
        model = GPTModel(
            config,
            spec,
            vocab_size=padded_vocab,
            max_sequence_length=arch.max_positions + arch.spare_positions,
            pre_process=chunk.embedding,
            post_process=chunk.head,
            parallel_output=False,
            share_embeddings_and_output_weights=arch.tied,
            pg_collection=groups,
            vp_stage=vp_stage,
            **_position_arguments(arch.rope, latent=arch.mla is not None),
        )
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise UsageError(
            "megatron-core refuses this model or layout",
            found=str(error) or type(error).__name__,
            hint=LEVELS,
        ) from error
    layers = tuple(layer.layer_number - 1 for layer in model.decoder.layers)
    if layers != chunk.layers:
        raise ShardtoolError(
            "megatron-core puts other layers into a stage than the layout does",
            where=f"stage {chunk.pp}, chunk {chunk.vpp}",
            expected=str(chunk.layers),
            found=str(layers),
            hint=BUG,
        )
    # torch's norms are made in fp32 whatever params_dtype says; Megatron-LM casts the whole model too, but for the
    # routers' expert biases (transformer/module.py Float16Module, moe/router.py)
    model.to(dtype)
    for module in model.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    return model.eval()
