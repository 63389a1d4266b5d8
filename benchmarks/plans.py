"""Plan time by family: `shardtool plan hf2megatron` as a process, for models of which only config and headers are there.

The files are as large as the published ones, with holes for the payload.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from shardtool.families.blocks import axis_sizes
from shardtool.families.registry import family_of
from shardtool.formats import safetensors_files
from shardtool.layout.huggingface import huggingface_layout

SHARD_BYTES = 8_600_000_000  # DeepSeek-V3: about 163 files, as published
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
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840, "hidden_act": "silu",
}  # fmt: skip
# 61 layers over 16 stages: 4, 14 times 4, 1
DEEPSEEK_V3_LAYOUT = "--tp 2 --pp 16 --ep 32 --first-stage-layers 4 --last-stage-layers 1"
CASES = (
    ("Llama-3.1-405B", LLAMA_405B, "--tp 8 --pp 16 --first-stage-layers 7 --last-stage-layers 7"),
    ("Mixtral-8x22B", MIXTRAL_8X22B, "--tp 4 --pp 4 --ep 8"),
    ("DeepSeek-V3", DEEPSEEK_V3, DEEPSEEK_V3_LAYOUT),
)


def sparse_checkpoint(directory: Path, config: dict[str, Any]) -> int:
    """A Hugging Face directory with config, index and headers; the payload is a hole. Returns its payload's bytes.

    All in bf16 but the router's correction bias, which is fp32 in the published files.
    """
    directory.mkdir(parents=True)
    family = family_of(config)
    a = family.read_config(config)
    layout = huggingface_layout(family.rules(a), axis_sizes(a))
    specs = [
        (key[1], layout.shape(piece), "float32" if key[1].endswith("e_score_correction_bias") else "bfloat16")
        for key, piece in layout.tensors()
    ]
    groups = safetensors_files.split_by_size(specs, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    total = 0
    for name, group in zip(safetensors_files.shard_names(len(groups)), groups, strict=True):
        skeleton = safetensors_files.skeleton(group)
        with (directory / name).open("wb") as file:
            for offset, data in skeleton.parts:
                file.seek(offset)
                file.write(data)
            file.truncate(skeleton.size)
        total += sum(payload.nbytes for payload in skeleton.payload.values())
        weight_map.update({spec[0]: name for spec in group})
    count = sum(prod(shape) for _, shape, _ in specs)
    (directory / safetensors_files.INDEX).write_bytes(safetensors_files.index_json(weight_map, total, count))
    (directory / "config.json").write_text(json.dumps(config))
    return total


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Each case in both formats: the median of the wall time, and the tensors of the target."""
    import measure  # noqa: PLC0415 - tests, which have another module of this name, take the models from here

    with tempfile.TemporaryDirectory() as folder:
        for name, config, layout in CASES:
            model = Path(folder) / name
            sparse_checkpoint(model, config)
            for form in ("torch", "torch_dist"):
                command = [sys.executable, "-m", "shardtool", "plan", "hf2megatron", str(model), *layout.split()]
                command += ["--format", form]
                told = subprocess.run([*command, "--json"], capture_output=True, check=True, env=measure.ENVIRONMENT)
                seconds = []
                for _ in range(rounds):
                    started = time.perf_counter()
                    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=measure.ENVIRONMENT)
                    seconds.append(time.perf_counter() - started)
                found = json.loads(told.stdout)
                yield {"technique": name, "format": form, "layout": layout.replace("--", ""), "wall": median(seconds),
                       "bytes": found["bytes_written"], "files": len(found["files"])}  # fmt: skip


if __name__ == "__main__":
    for row in rows(5):
        sys.stdout.write(
            " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()) + "\n"
        )
