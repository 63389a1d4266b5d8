"""Plan time by family: headers to plan, dtypes and target files laid out, without a checkpoint on disk."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from typing import Any

from shardtool.checkpoint.megatron_target import dist_target, legacy_target, rank_files
from shardtool.checkpoint.opened import Header, account
from shardtool.checkpoint.target import resolve_dtypes, target_tensors
from shardtool.families.blocks import axis_sizes
from shardtool.families.megatron_args import to_args
from shardtool.families.registry import family_of
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.megatron import Spelling, dist_layout, legacy_layout
from shardtool.layout.mesh import Mesh, chunks, padded_vocab, virtual_stages
from shardtool.plan.plan import plan

LLAMA_405B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTRAL_8X22B: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 6144, "intermediate_size": 16384,
    "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 32768, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 3,
    "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "moe_intermediate_size": 2048,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
    "max_position_embeddings": 163840, "hidden_act": "silu",
}  # fmt: skip
CASES = (
    ("Llama-3.1-405B", LLAMA_405B, Mesh(tp=8, pp=16, first_stage_layers=7, last_stage_layers=7)),
    ("Mixtral-8x22B", MIXTRAL_8X22B, Mesh(tp=4, pp=4, ep=8)),
    ("DeepSeek-V3", DEEPSEEK_V3, Mesh(tp=2, pp=16, ep=32, first_stage_layers=4, last_stage_layers=1)),
)


def measure(config: dict[str, Any], mesh: Mesh, fmt: str) -> tuple[float, float, int]:
    """CPU seconds from headers to the plan, and on to the files' skeletons and metadata; tensors of the target."""
    family = family_of(config)
    a = family.read_config(config)
    rules, sizes = family.rules(a), axis_sizes(a)
    source = huggingface_layout(rules, sizes)
    headers = {key: Header(source.shape(piece), "bfloat16") for key, piece in source.tensors()}
    gc.collect()
    started = time.process_time()
    account(source, headers, "")
    padded, stages = padded_vocab(a.vocab_size, 128, mesh.tp), chunks(mesh, a.num_layers, a.mtp_layers)
    files = rank_files(mesh, experts=a.moe is not None)
    if fmt == "torch":
        layout = legacy_layout(rules, sizes, padded, stages, mesh, Spelling("te", "grouped"), files)
    else:
        layout = dist_layout(rules, sizes, padded, stages, mesh, stacked=a.uniform)
    made = plan(source, layout)
    planned = time.process_time() - started
    tensors = target_tensors(made, resolve_dtypes(made, headers, None))
    args = to_args(a, mesh, padded=padded, divisible_by=128, dtype="bfloat16", fmt=fmt, spec="te")
    if fmt == "torch":
        legacy_target(tensors, args, files.values(), virtual_stages(mesh), 0, "te")
    else:
        dist_target(tensors, layout, args, a, 0)
    return planned, time.process_time() - started, len(tensors)


def rows() -> Iterator[dict[str, Any]]:
    """Each case in both formats: the best of three."""
    gc.set_threshold(100_000, 20, 20)  # as the command line does
    for name, config, mesh in CASES:
        for fmt in ("torch", "torch_dist"):
            planned, whole, count = min(measure(config, mesh, fmt) for _ in range(3))
            yield {
                "technique": name, "format": fmt, "layout": f"tp {mesh.tp} pp {mesh.pp} ep {mesh.ep}", "tensors": count,
                "planned": planned, "whole": whole,
            }  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(
            " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()) + "\n"
        )
