"""The Megatron-LM launch flags of a model (training/arguments.py, core 0.16 to 0.19)."""

from __future__ import annotations

from shardtool.families.architecture import Architecture
from shardtool.families.megatron_args import whole
from shardtool.families.megatron_args_out import linear_args, mla_args, position_embedding, window_flags
from shardtool.layout.mesh import Mesh


def launch_flags(
    a: Architecture, mesh: Mesh, dtype: str, *, divisible_by: int, fmt: str, stored_only: bool = False
) -> list[str]:
    """Megatron-LM launch flags of a model, one per entry.

    With `stored_only` false: every flag. With it true: only those that `--use-checkpoint-args` does not read back.
    """
    scaling = a.rope.scaling if a.rope else None
    read_back = [
        f"--num-layers {a.num_layers}",
        f"--hidden-size {a.hidden_size}",
        f"--ffn-hidden-size {a.ffn_size}",
        f"--num-attention-heads {a.num_heads}",
        f"--kv-channels {a.head_dim}",
        *(
            [f"--group-query-attention --num-query-groups {a.num_query_groups}"]
            if a.num_query_groups != a.num_heads
            else []
        ),
        f"--max-position-embeddings {a.max_positions + a.spare_positions}",
        f"--seq-length {a.max_positions}",
        f"--position-embedding-type {position_embedding(a)}",
        *([f"--rotary-base {whole(a.rope.theta)}", f"--rotary-percent {a.rope.fraction}"] if a.rope else []),
        *([] if a.linear_bias else ["--disable-bias-linear"]),
        *(["--add-qkv-bias"] if a.qkv_bias else []),
        *(["--swiglu"] if a.gated and a.activation == "silu" else []),
        *(["--squared-relu"] if a.activation == "relu2" else []),
        *([] if a.tied else ["--untie-embeddings-and-output-weights"]),
        f"--normalization {'RMSNorm' if a.norm == 'rms' else 'LayerNorm'}",
        *(["--apply-layernorm-1p"] if a.centred_norms else []),
        *_moe_read_back(a),
        f"--attention-dropout {a.attention_dropout}",
        f"--hidden-dropout {a.hidden_dropout}",
    ]
    not_read_back = [
        f"--tensor-model-parallel-size {mesh.tp}",
        f"--pipeline-model-parallel-size {mesh.pp}",
        *(_expert_parallel_flags(mesh) if a.moe else []),
        *_split_flags(mesh),
        f"--norm-epsilon {a.norm_eps}",
        *(["--qk-layernorm"] if a.qk_norm else []),
        *(
            [f"--no-rope-freq '{[int(layer in a.no_rope_layers) for layer in range(a.num_layers)]}'"]
            if a.no_rope_layers
            else []
        ),
        *(["--rotary-interleaved"] if a.rope and a.rope.interleaved else []),
        *_moe_flags(a),
        *([f"--mtp-num-layers {a.mtp_depth}"] if a.mtp_layers else []),
        *(["--mtp-use-repeated-layer"] if a.mtp_repeats > 1 else []),
        *_mla_flags(a),
        *(["--attention-output-gate"] if a.output_gate else []),
        *_linear_flags(a),
        *([f"--window-size {a.window - 1},0"] if a.window is not None else []),
        *([f"--window-attn-skip-freq '{window_flags(a)}'"] if a.window_layers is not None else []),
        *(["--softmax-type learnable"] if a.sinks else []),
        *(["--quick-geglu"] if a.activation == "quick_gelu" else []),
        *([f"--glu-linear-offset {a.glu_offset}"] if a.glu_offset else []),
        *([f"--activation-func-clamp-value {a.clamp}"] if a.clamp is not None else []),
        *_yarn_flags(a),
        *(
            [f"--use-rope-scaling --rope-scaling-factor {scaling.factor}"]
            if scaling and scaling.kind == "llama3"
            else []
        ),
        *(
            [f"--rotary-seq-len-interpolation-factor {whole(scaling.factor)}"]
            if scaling and scaling.kind == "linear"
            else []
        ),
        *(["--no-bias-gelu-fusion"] if a.activation == "gelu" else []),
        f"--make-vocab-size-divisible-by {divisible_by}",
        f"--ckpt-format {fmt}",
        *({"bfloat16": ["--bf16"], "float16": ["--fp16"]}.get(dtype, [])),
    ]
    return not_read_back if stored_only else read_back + not_read_back


def _moe_read_back(a: Architecture) -> list[str]:
    """What --use-checkpoint-args reads back of experts."""
    moe = a.moe
    if moe is None:
        return []
    layers = [int(layer in moe.layers) for layer in range(a.num_layers)]
    return [
        f"--num-experts {moe.num_experts}",
        *([] if a.uniform else [f"--moe-layer-freq '{layers}'"]),
        f"--moe-ffn-hidden-size {moe.ffn_size}",
        f"--moe-router-topk {moe.top_k}",
        f"--moe-router-score-function {moe.score}",
        *(["--moe-router-pre-softmax"] if moe.pre_softmax else []),
        *(["--moe-router-enable-expert-bias"] if moe.expert_bias else []),
        *([f"--moe-router-topk-scaling-factor {moe.scaling}"] if moe.scaling is not None else []),
        *([f"--moe-shared-expert-intermediate-size {moe.shared_ffn_size}"] if moe.shared_ffn_size else []),
    ]


def _expert_parallel_flags(mesh: Mesh) -> list[str]:
    flags = [f"--expert-model-parallel-size {mesh.ep}"] if mesh.ep > 1 else []
    return flags + ([f"--expert-tensor-parallel-size {mesh.expert_tp}"] if mesh.expert_tp != mesh.tp else [])


YARN = (
    "Megatron-LM has flags for yarn on plain attention since June 2026; before, its launcher must set the config's "
    "yarn_* attributes, which are in the args by their names"
)


def without_flag(a: Architecture) -> tuple[str, ...]:
    """What this model needs of TransformerConfig and no flag of Megatron-LM (to 0.19) sets, a line each.

    They have SwiGLU, GELU, squared ReLU and quick GEGLU; softmax_scale and gated_linear_unit are left out on purpose
    (arguments.py `exclude`).
    """
    needed = []
    if a.activation == "relu":
        needed.append("activation_func=torch.nn.functional.relu")
    if a.gated and a.activation in ("gelu", "gelu_tanh"):
        # F.gelu is the tanh form in megatron-core's fused function alone (fusions/fused_bias_geglu.py)
        fused = a.activation == "gelu_tanh"
        needed.append(
            f"gated_linear_unit=True, activation_func=torch.nn.functional.gelu, bias_activation_fusion={fused}"
        )
    if a.softmax_scale is not None:
        needed.append(f"softmax_scale={a.softmax_scale!r}")
    found = tuple(f"TransformerConfig needs {item}, for which Megatron-LM has no flag" for item in needed)
    return (*found, YARN) if position_embedding(a) == "yarn" else found


def _moe_flags(a: Architecture) -> list[str]:
    """What --use-checkpoint-args does not read back of experts, and what a launch needs besides."""
    moe = a.moe
    if moe is None:
        return []
    flags = ["--moe-grouped-gemm", "--moe-router-dtype fp32"]
    if moe.groups:
        flags.append(f"--moe-router-num-groups {moe.groups} --moe-router-group-topk {moe.group_top_k}")
    if moe.shared_gate:
        flags.append("--moe-shared-expert-gate")
    return flags


def _yarn_flags(a: Architecture) -> list[str]:
    """Yarn of plain attention: flags since June 2026; before, the launcher's code must set config.yarn_* itself."""
    if position_embedding(a) != "yarn":
        return []
    assert a.rope is not None and a.rope.scaling is not None
    yarn = a.rope.scaling
    return [
        f"--rotary-scaling-factor {yarn.factor}",
        f"--yarn-original-max-position-embeddings {yarn.original_max_positions}",
        f"--yarn-beta-fast {yarn.beta_fast} --yarn-beta-slow {yarn.beta_slow}",
        f"--mscale {yarn.mscale} --mscale-all-dim {yarn.mscale_all_dim}",
        f"--{'' if yarn.truncate else 'no-'}yarn-correction-range-round-to-int",
    ]


def _mla_flags(a: Architecture) -> list[str]:
    if a.mla is None:
        return []
    names = (
        "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type",
        "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    )  # fmt: skip
    values = mla_args(a)
    shown = [f"--{name.replace('_', '-')} {values[name]}" for name in names if values[name] is not None]
    return ["--multi-latent-attention", *shown]


def _linear_flags(a: Architecture) -> list[str]:
    values = {name: value for name, value in linear_args(a).items() if value is not None}
    return [f"--{name.replace('_', '-')} {_value(value)}" for name, value in values.items()]


def _value(value: object) -> str:
    return f"'{value}'" if isinstance(value, list) else str(value)


def _split_flags(mesh: Mesh) -> list[str]:
    flags = []
    if mesh.pipeline_layout is not None:
        flags.append(f"--pipeline-model-parallel-layout '{mesh.pipeline_layout}'")
    elif mesh.vpp > 1:
        flags.append(f"--num-virtual-stages-per-pipeline-rank {mesh.vpp}")
    if mesh.first_stage_layers is not None:
        flags.append(f"--decoder-first-pipeline-num-layers {mesh.first_stage_layers}")
    if mesh.last_stage_layers is not None:
        flags.append(f"--decoder-last-pipeline-num-layers {mesh.last_stage_layers}")
    if mesh.account_for_embedding:
        flags.append("--account-for-embedding-in-pipeline-split")
    if mesh.account_for_loss:
        flags.append("--account-for-loss-in-pipeline-split")
    return flags
