"""Megatron-LM's `args`: what a checkpoint stores of its model.

Names and read-back rules: Megatron-LM training/arguments.py and training/checkpointing.py `load_args_from_checkpoint`
(core 0.16 to 0.19): some names are forced from the checkpoint, some fill unset flags, the rest must be given again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from shardtool.layout.mesh import Mesh

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


# what megatron-core calls a gated delta net: the first to 0.19, the second since
GATED_DELTA_NET = ("gated_delta_net", "gdn")


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
            expected=", ".join(Folded.__struct_fields__),
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
