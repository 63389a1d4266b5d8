"""Megatron-LM's `args` as a checkpoint of ours stores them; `megatron_args` has their names, and reads them."""

from __future__ import annotations

from typing import Any

from msgspec.structs import asdict

from shardtool.families.architecture import Architecture
from shardtool.families.exactness import inexact
from shardtool.families.megatron_args import (
    FAMILY_NAME,
    FOLDED,
    GATED_DELTA_NET,
    GROUP_SCORE,
    HIDDEN_ACT,
    INEXACT,
    QK_NORM_WHOLE,
    SPARE_POSITIONS,
    ZERO_OUT_BIAS,
    whole,
)
from shardtool.layout.mesh import Mesh, virtual_stages


def to_args(
    a: Architecture, mesh: Mesh, *, padded: int, divisible_by: int, dtype: str, fmt: str, spec: str
) -> dict[str, Any]:
    """The `args` entries of a checkpoint that holds this model; dtypes as 'torch.bfloat16' strings."""
    scaling = a.rope.scaling if a.rope else None
    linear = scaling.factor if scaling and scaling.kind == "linear" else None
    chunks_per_stage = virtual_stages(mesh)
    return {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_size,
        "num_attention_heads": a.num_heads,
        "kv_channels": a.head_dim,
        "group_query_attention": a.num_query_groups != a.num_heads,
        "num_query_groups": a.num_query_groups,
        "max_position_embeddings": a.max_positions + a.spare_positions,
        "seq_length": a.max_positions,
        "position_embedding_type": position_embedding(a),
        "add_position_embedding": True,
        "use_rotary_position_embeddings": a.rope is not None,
        "rotary_base": whole(a.rope.theta) if a.rope else 10000,
        "rotary_percent": a.rope.fraction if a.rope else 1.0,
        "rotary_interleaved": a.rope.interleaved if a.rope else False,
        "rotary_seq_len_interpolation_factor": None if linear is None else whole(linear),
        "use_rope_scaling": scaling is not None and scaling.kind == "llama3",
        "rope_scaling_factor": scaling.factor if scaling and scaling.kind == "llama3" else 8.0,
        "add_bias_linear": a.linear_bias,
        "add_qkv_bias": a.qkv_bias,
        "swiglu": a.gated and a.activation == "silu",
        "quick_geglu": a.activation == "quick_gelu",
        "glu_linear_offset": a.glu_offset,
        "activation_func_clamp_value": a.clamp,
        "squared_relu": a.activation == "relu2",
        "openai_gelu": False,
        "bias_gelu_fusion": a.activation == "gelu_tanh",
        "untie_embeddings_and_output_weights": not a.tied,
        "apply_layernorm_1p": a.centred_norms,
        "normalization": "RMSNorm" if a.norm == "rms" else "LayerNorm",
        "norm_epsilon": a.norm_eps,
        "qk_layernorm": a.qk_norm,
        "softmax_type": "learnable" if a.sinks else "vanilla",
        "window_size": None if a.window is None else (a.window - 1, 0),
        "window_attn_skip_freq": window_flags(a),
        "attention_dropout": a.attention_dropout,
        "hidden_dropout": a.hidden_dropout,
        "apply_query_key_layer_scaling": False,
        "vocab_size": a.vocab_size,
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": divisible_by,
        "no_rope_freq": [int(layer in a.no_rope_layers) for layer in range(a.num_layers)] if a.no_rope_layers else None,
        **_unnamed(a),
        **_moe_args(a),
        **mla_args(a),
        **yarn_args(a),
        "attention_output_gate": a.output_gate,
        **linear_args(a),
        "mtp_num_layers": a.mtp_depth or None,
        "mtp_use_repeated_layer": a.mtp_repeats > 1,
        "tensor_model_parallel_size": mesh.tp,
        "pipeline_model_parallel_size": mesh.pp,
        "virtual_pipeline_model_parallel_size": chunks_per_stage if chunks_per_stage > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "expert_model_parallel_size": mesh.ep,
        "expert_tensor_parallel_size": mesh.expert_tp,
        "context_parallel_size": 1,
        "decoder_first_pipeline_num_layers": mesh.first_stage_layers,
        "decoder_last_pipeline_num_layers": mesh.last_stage_layers,
        "account_for_embedding_in_pipeline_split": mesh.account_for_embedding,
        "account_for_loss_in_pipeline_split": mesh.account_for_loss,
        "pipeline_model_parallel_layout": mesh.pipeline_layout,
        "params_dtype": f"torch.{dtype}",
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "world_size": mesh.tp * mesh.pp,
        "data_parallel_size": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "iteration": 0,
        "ckpt_format": fmt,
        "transformer_impl": "transformer_engine" if spec == "te" else "local",
        "no_save_optim": True,
        "no_save_rng": True,
        FAMILY_NAME: a.family,
    }


def _unnamed(a: Architecture) -> dict[str, Any]:
    """What Megatron-LM 0.16 has no arguments for: fields of TransformerConfig, which it takes over from args of the
    same name (arguments.py core_transformer_config_from_args), and entries of our own."""
    found: dict[str, Any] = {}
    if a.gated and a.activation not in ("silu", "quick_gelu"):
        found["gated_linear_unit"] = True
    if found or a.activation == "relu":
        found[HIDDEN_ACT] = a.activation
    if a.softmax_scale is not None:
        found["softmax_scale"] = a.softmax_scale
    if a.folded is not None:
        found[FOLDED] = asdict(a.folded)
    if a.spare_positions:
        found[SPARE_POSITIONS] = a.spare_positions
    if a.zero_out_bias:
        found[ZERO_OUT_BIAS] = True
    if a.qk_norm_whole:
        found[QK_NORM_WHOLE] = True
    if a.moe and a.moe.group_score is not None:
        found[GROUP_SCORE] = a.moe.group_score
    if reason := inexact(a):
        found[INEXACT] = reason
    return found


def _moe_args(a: Architecture) -> dict[str, Any]:
    moe = a.moe
    if moe is None:
        return {"num_experts": None}
    return {
        "num_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_size,
        # a list makes megatron-core keep one torch_dist key per layer (transformer_block.py)
        "moe_layer_freq": 1 if a.uniform else [int(layer in moe.layers) for layer in range(a.num_layers)],
        "moe_router_score_function": moe.score,
        "moe_router_pre_softmax": moe.pre_softmax,
        "moe_router_topk_scaling_factor": moe.scaling,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_num_groups": moe.groups,
        "moe_router_group_topk": moe.group_top_k,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_grouped_gemm": True,
        "moe_router_load_balancing_type": "none",
    }


def position_embedding(a: Architecture) -> str:
    """The value of --position-embedding-type; latent attention has its yarn under --rope-type."""
    if a.rope is None:
        return "learned_absolute"
    return "yarn" if a.mla is None and a.rope.scaling and a.rope.scaling.kind == "yarn" else "rope"


def window_flags(a: Architecture) -> list[int] | None:
    """1 for each layer whose attention has the window, None where all have (transformer/utils.py is_layer_window_attention)."""
    return None if a.window_layers is None else [int(layer in a.window_layers) for layer in range(a.num_layers)]


def yarn_args(a: Architecture) -> dict[str, Any]:
    """Yarn of plain attention, by the names that GPTModel looks for in its config (gpt_model.py 0.16.1).

    Megatron-LM has arguments for them since June 2026 (argument_utils.py _apply_yarn_config_from_args), some by the names
    of latent attention's.
    """
    if position_embedding(a) != "yarn":
        return {}
    assert a.rope is not None and a.rope.scaling is not None
    yarn = a.rope.scaling
    return {
        "yarn_rotary_scaling_factor": yarn.factor,
        "yarn_original_max_position_embeddings": yarn.original_max_positions,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "yarn_mscale": yarn.mscale,
        "yarn_mscale_all_dim": yarn.mscale_all_dim,
        "yarn_correction_range_round_to_int": yarn.truncate,
        "rotary_scaling_factor": yarn.factor,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def mla_args(a: Architecture) -> dict[str, Any]:
    if a.mla is None:
        return {"multi_latent_attention": False}
    scaling = a.rope.scaling if a.rope else None
    yarn = scaling if scaling and scaling.kind == "yarn" else None
    return {
        "multi_latent_attention": True,
        "q_lora_rank": a.mla.query_rank,
        "kv_lora_rank": a.mla.key_value_rank,
        "qk_head_dim": a.mla.nope_dim,
        "qk_pos_emb_head_dim": a.mla.rope_dim,
        "v_head_dim": a.mla.value_dim,
        "rope_type": "yarn" if yarn else "rope",
        # megatron-core scales rope and softmax by these whatever the type: 1 means unchanged
        "rotary_scaling_factor": yarn.factor if yarn else 1.0,
        "original_max_position_embeddings": yarn.original_max_positions if yarn else a.max_positions,
        "beta_fast": yarn.beta_fast if yarn else 32,
        "beta_slow": yarn.beta_slow if yarn else 1,
        "mscale": yarn.mscale if yarn else 1.0,
        "mscale_all_dim": yarn.mscale_all_dim if yarn else 0.0,
    }


def linear_args(a: Architecture) -> dict[str, Any]:
    """The args of linear attention."""
    linear = a.linear
    if linear is None:
        return {"experimental_attention_variant": None}
    return {
        "experimental_attention_variant": GATED_DELTA_NET[0],
        "linear_attention_freq": [int(layer in linear.layers) for layer in range(a.num_layers)],
        "linear_conv_kernel_dim": linear.kernel,
        "linear_key_head_dim": linear.key_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_num_key_heads": linear.key_heads,
        "linear_num_value_heads": linear.value_heads,
    }
