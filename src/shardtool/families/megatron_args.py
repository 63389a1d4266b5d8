"""Megatron-LM's `args`: what a checkpoint stores of its model.

Names and read-back rules: Megatron-LM training/arguments.py and training/checkpointing.py `load_args_from_checkpoint`
(core 0.16 to 0.19): some names are forced from the checkpoint, some fill unset flags, the rest must be given again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from shardtool.errors import CheckpointError
from shardtool.families.architecture import (
    Architecture,
    Folded,
    LatentAttention,
    LinearAttention,
    MixtureOfExperts,
    Rope,
    RopeScaling,
)  # fmt: skip
from shardtool.families.exactness import inexact
from shardtool.layout.mesh import Mesh, virtual_stages

Args = Mapping[str, Any]

# our own entries in args: the Hugging Face family that the checkpoint came from, and what Megatron-LM has no name for
FAMILY_NAME = "hf_model_type"
HIDDEN_ACT = "hf_hidden_act"
FOLDED = "hf_folded"
SPARE_POSITIONS = "hf_spare_positions"
QK_NORM_WHOLE = "hf_qk_norm_whole"
ZERO_OUT_BIAS = "hf_zero_out_bias"
GROUP_SCORE = "hf_moe_group_score"
INEXACT = "hf_inexact"  # why megatron-core computes another function from these weights

NOT_CONVERTED = {
    "hybrid_override_pattern": "hybrid layers",
    "hybrid_layer_pattern": "hybrid layers",
    "linear_attention_type": "linear attention",
    "heterogeneous_layers_config_path": "heterogeneous layers",
    "heterogeneous_layers_config_encoded_json": "heterogeneous layers",
    "moe_mlp_glu_interleave_size": "experts with gate and up rows in alternating blocks",
}

ARGS_WRONG = "give a save whose args are whole; they can be changed with torch.load and torch.save"
OTHER_MODEL = "docs/families.md says which models are converted"


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


def _plain_yarn(args: Args) -> RopeScaling:
    def get(name: str, default: Any) -> Any:
        """As GPTModel's config has it, else as Megatron-LM's arguments say it."""
        found = args.get(f"yarn_{name}", args.get(name))
        return default if found is None else found

    return RopeScaling(
        "yarn",
        float(get("rotary_scaling_factor", 1.0)),
        original_max_positions=get("original_max_position_embeddings", 4096),
        beta_fast=float(get("beta_fast", 32.0)),
        beta_slow=float(get("beta_slow", 1.0)),
        mscale=float(get("mscale", 1.0)),
        mscale_all_dim=float(get("mscale_all_dim", 0.0)),
        truncate=bool(get("correction_range_round_to_int", True)),
    )


def _window_layers(args: Args, window: Any) -> tuple[int, ...] | None:
    """The layers with the window: all but every n-th, or those with a 1 (transformer/utils.py is_layer_window_attention)."""
    frequency, count = args.get("window_attn_skip_freq"), args["num_layers"]
    if window is None or frequency is None:
        return None
    if isinstance(frequency, str):
        frequency = _frequency(frequency)
    if isinstance(frequency, int):
        frequency = [int((layer + 1) % frequency != 0) for layer in range(count)]
    held = tuple(layer for layer, flag in enumerate(frequency[:count]) if flag)
    return None if len(held) == count else held


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


# what megatron-core calls a gated delta net: the first to 0.19, the second since
GATED_DELTA_NET = ("gated_delta_net", "gdn")


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


def _linear(args: Args) -> LinearAttention | None:
    variant = args.get("experimental_attention_variant")
    if variant is None:
        return None
    if variant not in GATED_DELTA_NET:
        raise CheckpointError(
            "this kind of attention is not converted",
            where="args",
            expected=" or ".join(GATED_DELTA_NET),
            found=variant,
            hint=OTHER_MODEL,
        )
    frequency, count = args.get("linear_attention_freq"), args["num_layers"]
    if isinstance(frequency, str):
        frequency = _frequency(frequency)
    if isinstance(frequency, int):  # one full attention every so many layers
        frequency = [int((layer + 1) % frequency != 0) for layer in range(count)]
    return LinearAttention(
        tuple(layer for layer, flag in enumerate((frequency or [])[:count]) if flag),
        args.get("linear_num_key_heads") or 16,
        args.get("linear_num_value_heads") or 32,
        args.get("linear_key_head_dim") or 128,
        args.get("linear_value_head_dim") or 128,
        args.get("linear_conv_kernel_dim") or 4,
    )


def _moe(args: Args, num_layers: int, ffn_size: int) -> MixtureOfExperts | None:
    if not args.get("num_experts"):
        return None
    frequency = args.get("moe_layer_freq", 1)
    if isinstance(frequency, str):
        frequency = _frequency(frequency)
    if isinstance(frequency, int):
        # layer i has experts where i is a multiple (gpt_layer_specs.py get_gpt_decoder_block_spec)
        frequency = [int(layer % frequency == 0) for layer in range(num_layers)]
    if len(frequency) != num_layers:
        raise CheckpointError(
            "moe_layer_freq does not fit the layers", where="args", expected=f"{num_layers} entries",
            found=str(len(frequency)),
            hint=ARGS_WRONG,
        )  # fmt: skip
    score: Literal["softmax", "sigmoid"] = (
        "sigmoid" if args.get("moe_router_score_function") == "sigmoid" else "softmax"
    )
    return MixtureOfExperts(
        args["num_experts"],
        args.get("moe_router_topk") or 2,
        args.get("moe_ffn_hidden_size") or ffn_size,
        tuple(layer for layer, flag in enumerate(frequency) if flag),
        score,
        bool(args.get("moe_router_pre_softmax")),
        args.get("moe_router_topk_scaling_factor"),
        bool(args.get("moe_router_enable_expert_bias")),
        args.get("moe_router_num_groups"),
        args.get("moe_router_group_topk"),
        args.get(GROUP_SCORE),
        args.get("moe_shared_expert_intermediate_size") or 0,
        bool(args.get("moe_shared_expert_gate")),
    )


def _no_rope(args: Args) -> tuple[int, ...]:
    """The layers without rope: every n-th, or those with a 1 (transformer_config.py 0.16.1)."""
    frequency, count = args.get("no_rope_freq"), args["num_layers"]
    if not frequency:
        return ()
    if isinstance(frequency, str):
        frequency = _frequency(frequency)
    if isinstance(frequency, int):
        return tuple(range(frequency - 1, count, frequency))
    return tuple(layer for layer, flag in enumerate(frequency) if flag)


def _frequency(text: str) -> int | list[int]:
    """A `--moe-layer-freq` string: an integer, or lists of integers with + and *, such as ([0]*3+[1]*58)."""
    if text.strip().isdecimal():
        return int(text)
    if not re.fullmatch(r"[\[\]()\d\s,+*]+", text):
        raise CheckpointError(
            "moe_layer_freq cannot be read",
            where="args",
            expected="an integer or ([0]*3+[1]*58)",
            found=text[:80],
            hint=ARGS_WRONG,
        )
    layers: list[int] = []
    for items, times in re.findall(r"\[([\d\s,]*)\]\s*(?:\*\s*(\d+))?", text):
        layers += [int(item) for item in items.split(",") if item.strip()] * int(times or 1)
    return layers


def _mla(args: Args) -> LatentAttention | None:
    if not args.get("multi_latent_attention"):
        return None
    return LatentAttention(
        args.get("q_lora_rank"),
        args.get("kv_lora_rank") or 512,
        args.get("qk_head_dim") or 128,
        args.get("qk_pos_emb_head_dim") or 64,
        args.get("v_head_dim") or 128,
    )


def whole(value: float) -> float | int:
    """Megatron-LM's --rotary-base and --rotary-seq-len-interpolation-factor are integers; keep others as they are."""
    return int(value) if float(value).is_integer() else value


def from_args(args: Args) -> Architecture:
    """The architecture that a Megatron checkpoint's args describe.

    Absent entries take Megatron-LM's defaults (training/arguments.py 0.16). CheckpointError where something is missing
    that has no default, or where the model is of a kind that is not converted.
    """
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if args.get(name) is None]
    if missing:
        raise CheckpointError(
            "the checkpoint's args do not say what model it is",
            where="args",
            expected=", ".join(missing),
            hint=ARGS_WRONG,
        )
    for name, what in NOT_CONVERTED.items():
        if args.get(name):
            raise CheckpointError(
                f"the model has {what}, which is not converted",
                where="args",
                expected=f"no {name}",
                found=repr(args[name]),
                hint=OTHER_MODEL,
            )
    heads, hidden = args["num_attention_heads"], args["hidden_size"]
    linear_bias = bool(args.get("add_bias_linear", not args.get("disable_bias_linear", False)))
    gated = bool(args.get("swiglu") or args.get("quick_geglu") or args.get("gated_linear_unit"))
    ffn = args.get("ffn_hidden_size") or (int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden)
    window = args.get("window_size")
    if window is not None and (len(window) != 2 or window[1] != 0):
        raise CheckpointError(
            "the attention window is not causal",
            where="args",
            expected="window_size (W, 0)",
            found=repr(window),
            hint=OTHER_MODEL,
        )
    depth, repeated = args.get("mtp_num_layers") or 0, args.get("mtp_use_repeated_layer")
    spare = args.get(SPARE_POSITIONS) or 0
    return Architecture(
        family=str(args.get(FAMILY_NAME) or ""),
        num_layers=args["num_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_query_groups=(args.get("num_query_groups") or heads) if args.get("group_query_attention", True) else heads,
        head_dim=args.get("kv_channels") or hidden // heads,
        ffn_size=ffn,
        vocab_size=args.get("vocab_size") or args.get("padded_vocab_size") or 0,
        max_positions=(args.get("max_position_embeddings") or args.get("seq_length") or 0) - spare,
        norm="rms" if args.get("normalization", "LayerNorm") == "RMSNorm" else "layer",
        norm_eps=args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
        activation=_activation(args),
        gated=gated,
        glu_offset=float(args.get("glu_linear_offset") or 0.0) if gated else 0.0,
        clamp=args.get("activation_func_clamp_value") if gated else None,
        qkv_bias=bool(args.get("add_qkv_bias")) and not linear_bias,  # a bias on every linear includes qkv
        linear_bias=linear_bias,
        zero_out_bias=bool(args.get(ZERO_OUT_BIAS)),
        qk_norm=bool(args.get("qk_layernorm")),
        qk_norm_whole=bool(args.get(QK_NORM_WHOLE)),
        tied=not args.get("untie_embeddings_and_output_weights", False),
        rope=_rope(args),
        window=None if window is None else window[0] + 1,
        window_layers=_window_layers(args, window),
        sinks=_sinks(args),
        no_rope_layers=_no_rope(args),
        moe=_moe(args, args["num_layers"], ffn),
        mla=_mla(args),
        mtp_layers=min(depth, 1) if repeated else depth,
        mtp_repeats=max(depth, 1) if repeated else 1,
        output_gate=bool(args.get("attention_output_gate")),
        linear=_linear(args),
        spare_positions=spare,
        softmax_scale=args.get("softmax_scale"),
        folded=_folded(args),
        centred_norms=bool(args.get("apply_layernorm_1p")),
        attention_dropout=args.get("attention_dropout") or 0.0,
        hidden_dropout=args.get("hidden_dropout") or 0.0,
    )


def _activation(args: Args) -> Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]:
    if args.get("swiglu"):
        return "silu"
    if args.get("quick_geglu"):
        return "quick_gelu"
    if args.get("squared_relu"):
        return "relu2"
    named = args.get(HIDDEN_ACT)
    if named in ("gelu", "gelu_tanh", "relu"):
        return named  # type: ignore[no-any-return]  # one of the literals
    # megatron-core's F.gelu is the tanh form under bias_gelu_fusion (fusions/fused_bias_gelu.py), erf without it
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return "gelu_tanh" if args.get("openai_gelu") or fused else "gelu"


def _folded(args: Args) -> Folded | None:
    found = args.get(FOLDED)
    if found is None:
        return None
    try:
        return Folded(**found)
    except TypeError as error:
        raise CheckpointError(
            "the checkpoint's args are damaged",
            where=f"args: {FOLDED}",
            expected=", ".join(item.name for item in fields(Folded)),
            found=repr(found)[:80],
            hint=ARGS_WRONG,
        ) from error


def _sinks(args: Args) -> bool:
    kind = args.get("softmax_type") or "vanilla"
    if kind not in ("vanilla", "learnable"):
        raise CheckpointError(
            "this kind of softmax is not converted",
            where="args",
            expected="vanilla or learnable",
            found=kind,
            hint=OTHER_MODEL,
        )
    return kind == "learnable"


def _rope(args: Args) -> Rope | None:
    kind = args.get(
        "position_embedding_type", "rope" if args.get("use_rotary_position_embeddings") else "learned_absolute"
    )
    if kind == "learned_absolute":
        return None
    if kind not in ("rope", "yarn"):
        raise CheckpointError(
            "this position embedding is not converted",
            where="args",
            expected="rope, yarn or learned_absolute",
            found=kind,
            hint=OTHER_MODEL,
        )
    scaling = None
    if kind == "yarn" and not args.get("multi_latent_attention"):
        scaling = _plain_yarn(args)
    elif args.get("multi_latent_attention"):
        if args.get("rope_type", "yarn") == "yarn" and args.get("rotary_scaling_factor", 40) != 1:
            scaling = RopeScaling(
                "yarn",
                float(args.get("rotary_scaling_factor", 40)),
                original_max_positions=args.get("original_max_position_embeddings", 4096),
                beta_fast=float(args.get("beta_fast", 32)),
                beta_slow=float(args.get("beta_slow", 1)),
                mscale=float(args.get("mscale", 1.0)),
                mscale_all_dim=float(args.get("mscale_all_dim", 0.0)),
            )
    elif args.get("use_rope_scaling"):
        scaling = RopeScaling("llama3", float(args.get("rope_scaling_factor") or 8.0))
    elif factor := args.get("rotary_seq_len_interpolation_factor"):
        scaling = RopeScaling("linear", float(factor))
    return Rope(
        float(args.get("rotary_base") or 10000),
        args.get("rotary_percent", 1.0),
        bool(args.get("rotary_interleaved")),
        scaling,
    )


def mesh_from_args(args: Args) -> Mesh:
    """The parallel layout that the args record."""
    return Mesh(
        tp=args.get("tensor_model_parallel_size") or 1,
        pp=args.get("pipeline_model_parallel_size") or 1,
        vpp=args.get("virtual_pipeline_model_parallel_size") or 1,
        ep=args.get("expert_model_parallel_size") or 1,
        etp=args.get("expert_tensor_parallel_size"),
        first_stage_layers=args.get("decoder_first_pipeline_num_layers"),
        last_stage_layers=args.get("decoder_last_pipeline_num_layers"),
        account_for_embedding=bool(args.get("account_for_embedding_in_pipeline_split")),
        account_for_loss=bool(args.get("account_for_loss_in_pipeline_split")),
        pipeline_layout=args.get("pipeline_model_parallel_layout"),
    )
