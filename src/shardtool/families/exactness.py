"""Models whose weights Megatron can hold, while megatron-core computes another function from them."""

from __future__ import annotations

from shardtool.families.architecture import Architecture


def inexact(a: Architecture) -> str | None:
    """Why megatron-core as it is (0.16.1) does not compute this model, or None where it does."""
    if a.qk_norm_whole:
        return "its query and key norms are over all heads at once; megatron-core has norms per head (attention.py)"
    moe = a.moe
    if moe and moe.expert_bias and moe.score == "softmax":
        return (
            "its router adds an expert bias to softmax scores; megatron-core knows one with sigmoid scores only "
            "(transformer_config.py)"
        )
    if moe and moe.groups and moe.group_score is not None:
        best = moe.top_k // (moe.group_top_k or 1)
        return (
            f"its router ranks groups of experts by their best {moe.group_score}, megatron-core by their best {best} "
            "(moe_utils.py group_limited_topk)"
        )
    return None


def group_score(top_k: int, groups: int | None, group_top_k: int | None, best: int) -> int | None:
    """The `group_score` of a router that ranks groups by their `best` experts: None where that is megatron-core's way."""
    return None if not groups or top_k // (group_top_k or 1) == best else best
