"""Hugging Face directories: opened for reading, and laid out for writing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from shardtool.checkpoint.consistency import check_architecture
from shardtool.checkpoint.opened import Header, Opened, account
from shardtool.checkpoint.quantised import dequantised
from shardtool.checkpoint.target import Places, Target, TargetTensor, Write
from shardtool.errors import UsageError, in_words, located, no_model
from shardtool.families.architecture import Architecture
from shardtool.families.blocks import axis_sizes
from shardtool.families.family import Family
from shardtool.families.registry import family_of
from shardtool.formats import hf_bin, safetensors_files
from shardtool.formats.hf_index import plain_file, strict_json
from shardtool.formats.inert import brief
from shardtool.formats.small_files import CONFIG_BYTES, read_small
from shardtool.formats.stored import ITEMSIZE, Skeleton, Stored
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.layout import Key, Layout

CONFIG = "config.json"
Read = TypeVar("Read")
COUNTED = re.compile(r"(num|n)_\w*(layer|expert|head|group)s?\w*|\w*_layers")
MOST = 100_000  # layers, experts, heads: what is written out one by one


class HuggingFace(Struct, frozen=True):
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
            raise no_model(f"{file}: {name}", f"at most {MOST}", brief(value))
    return config


class Described(Struct, frozen=True):
    """What a Hugging Face directory says it is, beside the tensors that it has: the two may not fit each other."""

    config: Mapping[str, Any]
    family: Family
    architecture: Architecture
    stored: Mapping[str, Stored]

    def layout(self) -> Layout:
        """Where the components of its model live, in the tensors that are there."""
        a = self.architecture
        rules = self.family.rules_as_stored(a, self.stored.keys())
        return huggingface_layout(rules, axis_sizes(a), present=self.stored.keys())

    def headers(self) -> dict[Key, Header]:
        """Shapes and dtypes of the tensors that are there."""
        known: dict[tuple[tuple[int, ...], str], Header] = {}  # they are few, the tensors many
        for item in self.stored.values():
            kind = (item.shape, item.dtype)
            if kind not in known:
                known[kind] = Header(*kind)
        return {("", name, ()): known[item.shape, item.dtype] for name, item in self.stored.items()}

    def locate(self, key: Key) -> Stored:
        """A tensor's payload."""
        return self.stored[key[1]]


def describe_huggingface(path: Path, *, megatron: bool = True) -> Described:
    """Read config and headers and choose the family; whether the tensors are those of the model is not asked.

    Without `megatron` it is described as the family has it, whether or not megatron-core could hold it.
    Raises UsageError for an unknown architecture or one that cannot be converted.
    """
    config = read_config(path)

    def read() -> tuple[Family, Architecture]:
        family = family_of(config)
        return family, family.read_config(config, megatron=megatron)

    family, architecture = understood(read, path)
    return _describe(path, config, family, architecture)


def understood(read: Callable[[], Read], path: Path) -> Read:
    """What `read` makes of the config.json of a directory; CheckpointError where that fails."""
    try:
        with located(CONFIG, str(path / CONFIG if path.is_dir() else path)):
            return read()
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise no_model(
            str(path / CONFIG if path.is_dir() else path),
            "entries of the kinds that transformers writes",
            in_words(error),
        ) from error


def _describe(path: Path, config: Mapping[str, Any], family: Family, architecture: Architecture) -> Described:
    check_architecture(architecture, str(path / CONFIG), {item.name: item.key for item in family.table})
    stored = dequantised(_stored(path, family), config, str(path))
    mtp = family.mtp_prefix.format(n=architecture.num_layers)
    if architecture.mtp_layers and not any(name.startswith(mtp) for name in stored):
        architecture = replace(architecture, mtp_layers=0)  # transformers writes the count, never the layers
    return Described(config, family, architecture, stored)


def open_huggingface(path: Path, *, megatron: bool = True) -> HuggingFace:
    """Open a directory: read headers, choose the family, account for every tensor. No payload is read.

    Without `megatron` as the family has it, whether or not megatron-core could hold it.
    Raises UsageError for an unknown architecture or one that cannot be converted, CheckpointError where the tensors
    are not those of the model.
    """
    return _opened(path, describe_huggingface(path, megatron=megatron))


def open_model(path: Path, config: Mapping[str, Any], family: Family, architecture: Architecture) -> HuggingFace:
    """Open a directory whose config.json has been read already; raises CheckpointError as `open_huggingface`."""
    return _opened(path, _describe(path, config, family, architecture))


def _opened(path: Path, said: Described) -> HuggingFace:
    layout, found = said.layout(), said.headers()
    ignored = account(layout, found, str(path), said.family.ignored)
    headers = {key: found[key] for piece in layout.pieces for key in piece.all_keys()}
    opened = Opened(path, said.architecture, layout, headers, said.locate, ignored)
    return HuggingFace(said.config, said.family, opened)


def read_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a directory by their names on disk, headers alone."""
    names = (safetensors_files.WEIGHTS, safetensors_files.INDEX)
    if any((path / name).exists() for name in names):
        return safetensors_files.read_checkpoint(path)
    return hf_bin.read_checkpoint(path)


def _stored(path: Path, family: Family) -> dict[str, Stored]:
    """The tensors by their full name; a prefix that old files leave out is put back."""
    stored = read_tensors(path)
    if family.prefix and not any(name.startswith(family.prefix) for name in stored):
        return {name if name == "lm_head.weight" else family.prefix + name: item for name, item in stored.items()}
    return stored


def huggingface_target(
    tensors: list[TargetTensor], max_shard_size: int, residues: Mapping[Key, int] | None = None
) -> Target:
    """The files of a directory: one model.safetensors, or shards of at most `max_shard_size` bytes and their index.

    `residues` are places of payloads (safetensors_files.skeleton).
    """
    specs = [(tensor.key[1], tensor.shape, tensor.dtype) for tensor in tensors]
    groups = safetensors_files.split_by_size(specs, max_shard_size)
    names = safetensors_files.shard_names(len(groups))
    skeletons: dict[str, Skeleton] = {}
    files: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        wanted = (
            {spec[0]: residues[key] for spec in group if (key := ("", spec[0], ())) in residues} if residues else {}
        )
        skeletons[name] = safetensors_files.skeleton(group, residues=wanted)
        files.update(dict.fromkeys([spec[0] for spec in group], name))
    last: dict[str, Callable[[Write], object]] = {}
    if len(groups) > 1:
        size = sum(prod(spec[1]) * ITEMSIZE[spec[2]] for spec in specs)
        count = sum(prod(spec[1]) for spec in specs)
        last[safetensors_files.INDEX] = partial(_write_index, skeletons, size, count)
    places = Places([tensor.key for tensor in tensors], lambda key: (files[key[1]], key[1]))
    return Target(skeletons, places, last)


def _write_index(skeletons: Mapping[str, Skeleton], size: int, count: int, write: Write) -> None:
    weight_map = {str(key): name for name, skeleton in skeletons.items() for key in skeleton.payload}
    write(safetensors_files.index_json(weight_map, size, count))


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A config.json."""
    return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()
