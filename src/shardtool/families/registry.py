"""The known families, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from shardtool.errors import ShardtoolError, UsageError
from shardtool.families import (
    baichuan,
    chatglm,
    deepseek_v2,
    deepseek_v3,
    ernie_moe,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    internlm,
    internlm2,
    llama,
    llama_like,
    mimo,
    minicpm,
    mistral,
    mixtral,
    nemotron,
    olmo,
    olmoe,
    opt,
    phi3,
    qwen,
    qwen2,
    qwen3,
    qwen3_next,
    qwen_moe,
    starcoder2,
)
from shardtool.families.architecture import Architecture
from shardtool.families.family import RESHARD, Family, cannot_be_converted
from shardtool.families.refused import REFUSED

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gpt2.FAMILY,
        mixtral.FAMILY,
        gpt_oss.FAMILY,
        qwen_moe.QWEN2_MOE,
        qwen_moe.QWEN3_MOE,
        qwen3_next.QWEN3_NEXT,
        qwen3_next.QWEN3_5,
        qwen3_next.QWEN3_5_MOE,
        deepseek_v3.DEEPSEEK_V3,
        deepseek_v3.GLM4_MOE,
        deepseek_v3.DOTS1,
        deepseek_v2.FAMILY,
        mimo.FAMILY,
        olmoe.FAMILY,
        ernie_moe.FAMILY,
        phi3.FAMILY,
        glm.FAMILY,
        llama_like.SEED_OSS,
        llama_like.SMOLLM3,
        llama_like.ERNIE,
        llama_like.STABLELM,
        starcoder2.FAMILY,
        qwen.FAMILY,
        internlm2.FAMILY,
        baichuan.FAMILY,
        chatglm.FAMILY,
        gemma.FAMILY,
        nemotron.FAMILY,
        granite.GRANITE,
        granite.GRANITE_MOE,
        opt.FAMILY,
        gpt_neox.FAMILY,
        minicpm.FAMILY,
        olmo.FAMILY,
        internlm.FAMILY,
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by model_type, else by architectures.

    UsageError with the reason for one that megatron-core cannot express, naming the known ones otherwise.
    """
    if family := FAMILIES.get(str(config.get("model_type"))):
        return family
    classes = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.architecture in classes:
            return family
    if reason := REFUSED.get(str(config.get("model_type"))):
        raise cannot_be_converted(config["model_type"], reason)
    raise UsageError(
        "unknown architecture",
        where="config.json",
        expected="model_type " + ", ".join(sorted(FAMILIES)),
        found=f"model_type {config.get('model_type')!r}, architectures {classes}",
        hint="only the families above are known to be converted exactly; docs/adding-a-family.md says how to add one",
    )


def infer_family(a: Architecture, named: str | None = None) -> Family:
    """The family that expresses an architecture read from a Megatron checkpoint.

    `named` is the family that the checkpoint itself names (hf2megatron stores it); it must be able to express the
    architecture. Otherwise the first of the known families that can.
    """
    names = [named] if named else list(FAMILIES)
    reasons = []
    for name in names:
        family = FAMILIES.get(name)
        if family is None:
            raise UsageError(
                f"the checkpoint names an unknown family {name!r}",
                expected=", ".join(sorted(FAMILIES)),
                hint="give --hf the config.json of its model",
            )
        try:
            family.write_config(replace(a, family=name), "float32")
        except (ShardtoolError, KeyError, AssertionError) as error:
            said = f"it has no word for {error}" if isinstance(error, KeyError) else str(error)
            reasons.append(f"{name}: {'; '.join(getattr(error, 'details', ())) or said}")
        else:
            return family
    raise UsageError(
        "no Hugging Face architecture that is known here is this model",
        details=tuple(reasons),
        hint=RESHARD,
    )
