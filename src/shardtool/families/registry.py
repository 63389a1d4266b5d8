"""The known families, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any

from msgspec.structs import replace

from shardtool.errors import ShardtoolError, UsageError
from shardtool.families.architecture import Architecture
from shardtool.families.family import RESHARD, Family, cannot_be_converted
from shardtool.families.refused import REFUSED


class Families(MutableMapping[str, Family]):
    """Families by their model_type. A family's module is imported when it is asked for: a conversion needs one."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """`places` has the module and the name of each."""
        self._held: dict[str, Family | str] = {**places}

    def __getitem__(self, name: str) -> Family:
        held = self._held[name]
        if isinstance(held, str):
            module, attribute = held.split(".")
            found: Family = getattr(import_module(f"shardtool.families.{module}"), attribute)
            self._held[name] = held = found
        return held

    def __setitem__(self, name: str, family: Family) -> None:
        self._held[name] = family

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


FAMILIES = Families(
    {
        "llama": "llama.FAMILY",
        "mistral": "mistral.FAMILY",
        "qwen2": "qwen2.FAMILY",
        "qwen3": "qwen3.FAMILY",
        "gpt2": "gpt2.FAMILY",
        "mixtral": "mixtral.FAMILY",
        "gpt_oss": "gpt_oss.FAMILY",
        "qwen2_moe": "qwen_moe.QWEN2_MOE",
        "qwen3_moe": "qwen_moe.QWEN3_MOE",
        "qwen3_next": "qwen3_next.QWEN3_NEXT",
        "qwen3_5_text": "qwen3_next.QWEN3_5",
        "qwen3_5_moe_text": "qwen3_next.QWEN3_5_MOE",
        "deepseek_v3": "deepseek_v3.DEEPSEEK_V3",
        "glm4_moe": "deepseek_v3.GLM4_MOE",
        "dots1": "deepseek_v3.DOTS1",
        "deepseek_v2": "deepseek_v2.FAMILY",
        "mimo": "mimo.FAMILY",
        "olmoe": "olmoe.FAMILY",
        "ernie4_5_moe": "ernie_moe.FAMILY",
        "phi3": "phi3.FAMILY",
        "glm": "glm.FAMILY",
        "seed_oss": "llama_like.SEED_OSS",
        "smollm3": "llama_like.SMOLLM3",
        "ernie4_5": "llama_like.ERNIE",
        "stablelm": "llama_like.STABLELM",
        "starcoder2": "starcoder2.FAMILY",
        "qwen": "qwen.FAMILY",
        "internlm2": "internlm2.FAMILY",
        "baichuan": "baichuan.FAMILY",
        "chatglm": "chatglm.FAMILY",
        "gemma": "gemma.FAMILY",
        "nemotron": "nemotron.FAMILY",
        "granite": "granite.GRANITE",
        "granitemoe": "granite.GRANITE_MOE",
        "opt": "opt.FAMILY",
        "gpt_neox": "gpt_neox.FAMILY",
        "minicpm": "minicpm.FAMILY",
        "olmo": "olmo.FAMILY",
        "internlm": "internlm.FAMILY",
    }
)


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
