"""Well-known models that are not converted, each with its reason: what megatron-core 0.16's GPTModel cannot express."""

from __future__ import annotations

_PARALLEL = "attention and MLP read the same input (parallel residual), megatron-core's layers run one after the other"
_ALIBI = "positions are ALiBi biases on the attention scores, which megatron-core has not"
_POST_NORMS = "norms come after attention and MLP as well, or only there; megatron-core has them before"
_WIDE_QK = "q and k are normalised over all heads at once, megatron-core does it per head"
_LATE_QK = "q and k are normalised after rope, megatron-core does it before"
_CHUNKED = "attention is chunked and its temperature depends on the position, megatron-core's does neither"
_ENCODER = "it is an encoder with norms after attention and MLP, megatron-core's BertModel has them before"
_ENCODER_DECODER = "it is an encoder and a decoder; decoders alone are converted"
_STATE_SPACE = "it has state-space layers, which megatron-core has in MambaModel and not in GPTModel"

REFUSED = {
    "gptj": _PARALLEL,
    "codegen": _PARALLEL,
    "falcon": f"{_PARALLEL} (Falcon-RW: {_ALIBI})",
    "phi": f"{_PARALLEL}, and its head has a bias",
    "cohere": _PARALLEL,
    "cohere2": f"{_PARALLEL}, and only some layers have rope and a window",
    "bloom": f"{_ALIBI}, and embeddings are normalised",
    "mpt": _ALIBI,
    "RefinedWeb": _ALIBI,
    "RefinedWebModel": _PARALLEL,
    "gemma2": f"{_POST_NORMS}; attention scores and logits are soft-capped",
    "gemma3": f"{_POST_NORMS}; local and global layers have rope of two bases",
    "gemma3_text": f"{_POST_NORMS}; local and global layers have rope of two bases",
    "gemma3n": f"{_POST_NORMS}; layers have embeddings of their own",
    "gemma3n_text": f"{_POST_NORMS}; layers have embeddings of their own",
    "minicpm3": "its latent attention has norms of another width inside, and factors",
    "olmo2": f"{_POST_NORMS}; {_WIDE_QK}",
    "olmo3": f"{_POST_NORMS}; {_WIDE_QK}",
    "glm4": _POST_NORMS,
    "exaone4": _POST_NORMS,
    "hunyuan_v1_dense": _LATE_QK,
    "hunyuan_v1_moe": _LATE_QK,
    "minimax": "it has lightning (linear) attention layers, which megatron-core has not",
    "minimax_text_01": "it has lightning (linear) attention layers, which megatron-core has not",
    "minimax_m2": _WIDE_QK,
    "llama4": f"{_CHUNKED}; images are not converted either",
    "llama4_text": _CHUNKED,
    "phimoe": "its router is sparsemixer and its head has a bias, megatron-core has neither",
    "mimo_v2_flash": "keys and values differ in size, and the number of kv heads from layer to layer",
    "deepseek_v32": "attention is sparse by an indexer (DSA), which no layer spec without Transformer Engine has",
    "granitemoehybrid": _STATE_SPACE,
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "falcon_mamba": _STATE_SPACE,
    "jamba": _STATE_SPACE,
    "bamba": _STATE_SPACE,
    "zamba2": _STATE_SPACE,
    "nemotron_h": _STATE_SPACE,
    "kimi_linear": "it has Kimi delta attention, which megatron-core has not",
    "rwkv": "it is a recurrent network without attention",
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "distilbert": _ENCODER,
    "electra": _ENCODER,
    "t5": _ENCODER_DECODER,
    "mt5": _ENCODER_DECODER,
    "bart": _ENCODER_DECODER,
    "whisper": _ENCODER_DECODER,
}
