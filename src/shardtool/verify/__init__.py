"""Is the result the same model? Runs both in the libraries they are for, and compares.

    sides, prompts, report      plain data: what is compared, on what, and what came of it
    logits                      the comparison (`compare_logits`)
    huggingface                 one side: transformers
    pool, worker                the other: tensor parallel ranks of megatron-core as gloo processes on the CPU
    megatron_model, _load       a pipeline stage of megatron-core, loaded from the shards as a rank would
    shims                       what megatron-core needs to run on a CPU

Importing this package imports neither torch nor transformers nor megatron-core.
"""

from shardtool.verify.logits import compare_logits, run_side
from shardtool.verify.pool import close_pools, get_pool
from shardtool.verify.prompts import Limits, PromptSet, make_prompts
from shardtool.verify.report import Level, LogitsReport, VerifyReport
from shardtool.verify.sides import HuggingFaceSide, MegatronSide, Side

__all__ = [
    "HuggingFaceSide",
    "Level",
    "Limits",
    "LogitsReport",
    "MegatronSide",
    "PromptSet",
    "Side",
    "VerifyReport",
    "close_pools",
    "compare_logits",
    "get_pool",
    "make_prompts",
    "run_side",
]
