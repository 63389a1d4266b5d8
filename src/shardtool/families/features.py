"""What an architecture has, in words: for inspection and for the page of families."""

from __future__ import annotations

from shardtool.families.architecture import Architecture


def features(a: Architecture) -> list[str]:
    """The parts of a model, from attention to head."""
    found = [_attention(a)]
    found += ["q, k, v biases"] if a.qkv_bias else []
    found += ["biases on all linears"] if a.linear_bias else []
    found += ["q, k norms"] if a.qk_norm and a.mla is None else []
    found += ["gated attention output"] if a.output_gate else []
    found += ["gated delta net layers"] if a.linear is not None else []
    found += ["sliding window"] if a.window is not None else []
    found += _positions(a)
    found += ["LayerNorm"] if a.norm == "layer" else []
    found += [] if a.gated else ["MLP without gate"]
    found += _experts(a)
    found += ["multi-token prediction"] if a.mtp_layers else []
    return [*found, "tied head" if a.tied else "head of its own"]


def _attention(a: Architecture) -> str:
    if a.mla is not None:
        return "latent attention" + (" with a query rank" if a.mla.query_rank is not None else "")
    return "attention" if a.num_query_groups == a.num_heads else "grouped-query attention"


def _positions(a: Architecture) -> list[str]:
    if a.rope is None:
        return ["learned positions"]
    found = ["rope of neighbouring dims"] if a.rope.interleaved else []
    found += ["rope on a part of each head"] if a.rope.fraction != 1.0 else []
    found += [f"{a.rope.scaling.kind} rope scaling"] if a.rope.scaling is not None else []
    return found + (["layers without rope"] if a.no_rope_layers else [])


def _experts(a: Architecture) -> list[str]:
    moe = a.moe
    if moe is None:
        return []
    found = ["experts" if a.uniform else "experts in some layers"]
    found += ["sigmoid router"] if moe.score == "sigmoid" else []
    found += ["router bias"] if moe.expert_bias else []
    found += ["expert groups"] if moe.groups else []
    found += ["shared expert with a gate" if moe.shared_gate else "shared expert"] if moe.shared_ffn_size else []
    return found
