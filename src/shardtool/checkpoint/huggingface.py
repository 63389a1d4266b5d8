"""Hugging Face directories: opened for reading, and laid out for writing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from shardtool.checkpoint.consistency import check_architecture
from shardtool.checkpoint.opened import Header, Opened, account
from shardtool.checkpoint.quantised import dequantised
from shardtool.checkpoint.target import Target, TargetTensor
from shardtool.errors import CheckpointError, UsageError
from shardtool.families.blocks import axis_sizes
from shardtool.families.family import Family
from shardtool.families.registry import family_of
from shardtool.formats import hf_bin, safetensors_files
from shardtool.formats.hf_index import plain_file, strict_json
from shardtool.formats.inert import brief
from shardtool.formats.small_files import CONFIG_BYTES, read_small
from shardtool.formats.stored import ITEMSIZE, Skeleton, Stored
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import Key

CONFIG = "config.json"
COUNTED = re.compile(r"(num|n)_\w*(layer|expert|head|group)s?\w*|\w*_layers")
MOST = 100_000  # layers, experts, heads: what is written out one by one
# what travels with the weights: tokenizer, chat template, generation settings
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "tokenizer.jsonl", "preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class HuggingFace:
    """A Hugging Face directory: its config, family, and its tensors matched with the family's table."""

    config: Mapping[str, Any]
    family: Family
    opened: Opened


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a directory, or the file itself; UsageError where there is none, CheckpointError where it is broken."""
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise UsageError("no config.json", where=str(file), hint="give a Hugging Face directory or its config.json")
    if path.is_dir():
        plain_file(path, CONFIG, str(path))
    config = strict_json(read_small(file, CONFIG_BYTES), str(file))
    for name, value in config.items():
        counted = COUNTED.fullmatch(name) and isinstance(value, int) and value > MOST
        if counted or (isinstance(value, list) and len(value) > MOST):
            raise CheckpointError(
                "a config says more than a model has", where=f"{file}: {name}", expected=f"at most {MOST}",
                found=brief(value),
            )  # fmt: skip
    return config


def open_huggingface(path: Path) -> HuggingFace:
    """Open a directory: read headers, choose the family, account for every tensor. No payload is read.

    Raises UsageError for an unknown architecture or one that cannot be converted, CheckpointError where the tensors
    are not those of the model.
    """
    config = read_config(path)
    try:
        family = family_of(config)
        architecture = family.read_config(config)
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            "config.json cannot be understood", where=str(path / CONFIG), found=f"{type(error).__name__}: {error}"
        ) from error
    check_architecture(architecture, str(path / CONFIG))
    stored = dequantised(_stored(path, family), config, str(path))
    mtp = family.mtp_prefix.format(n=architecture.num_layers)
    if architecture.mtp_layers and not any(name.startswith(mtp) for name in stored):
        architecture = replace(architecture, mtp_layers=0)  # transformers writes the count, never the layers
    rules = family.rules(architecture)
    layout = huggingface_layout(rules, axis_sizes(architecture), present=stored.keys())
    found: dict[Key, Header] = {("", name, ()): Header(item.shape, item.dtype) for name, item in stored.items()}
    ignored = account(layout, found, str(path), family.ignored)
    headers = {key: found[key] for key, _ in layout.tensors()}
    opened = Opened(path, architecture, layout, headers, lambda key: stored[key[1]], ignored)
    return HuggingFace(config, family, opened)


def _stored(path: Path, family: Family) -> dict[str, Stored]:
    """The tensors by their full name; a prefix that old files leave out is put back."""
    names = (safetensors_files.WEIGHTS, safetensors_files.INDEX)
    if any((path / name).exists() for name in names):
        stored = safetensors_files.read_checkpoint(path)
    else:
        stored = hf_bin.read_checkpoint(path)
    if family.prefix and not any(name.startswith(family.prefix) for name in stored):
        return {name if name == "lm_head.weight" else family.prefix + name: item for name, item in stored.items()}
    return stored


def huggingface_target(tensors: list[TargetTensor], max_shard_size: int) -> Target:
    """The files of a directory: one model.safetensors, or shards of at most `max_shard_size` bytes and their index."""
    specs = [(tensor.key[1], tensor.shape, tensor.dtype) for tensor in tensors]
    groups = safetensors_files.split_by_size(specs, max_shard_size)
    names = safetensors_files.shard_names(len(groups))
    skeletons: dict[str, Skeleton] = {}
    places: dict[Key, tuple[str, Hashable]] = {}
    for name, group in zip(names, groups, strict=True):
        skeletons[name] = safetensors_files.skeleton(group)
        places.update({("", spec[0], ()): (name, spec[0]) for spec in group})
    last = {}
    if len(groups) > 1:
        weight_map = {spec[0]: name for name, group in zip(names, groups, strict=True) for spec in group}
        size = sum(prod(spec[1]) * ITEMSIZE[spec[2]] for spec in specs)
        count = sum(prod(spec[1]) for spec in specs)
        last[safetensors_files.INDEX] = partial(safetensors_files.index_json, weight_map, size, count)
    return Target(skeletons, places, last)


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A config.json."""
    return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()


def companions(source: Path) -> list[str]:
    """Tokenizer, chat template and generation config: the names of those that are there.

    CheckpointError where one is a link out of the directory: a copy of that file would travel with the model.
    """
    there = [name for name in COMPANIONS if (source / name).is_file()]
    for name in there:
        plain_file(source, name, str(source))
    return there


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what `companions` finds; the names."""
    copied = companions(source)
    for name in copied:
        shutil.copyfile(source / name, target / name)
    return copied
