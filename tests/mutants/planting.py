"""How faults get into the files of a checkpoint. Every change must change something, or the mutant is none."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]
Plant = Callable[[Path], None]


@contextmanager
def rank_files(checkpoint: Path) -> Iterator[dict[tuple[int, ...], dict[str, Any]]]:
    """The content of every rank's file, by the numbers in the names of their directories; changes are saved."""
    paths = sorted(checkpoint.glob("*/mp_rank_*/model_optim_rng.pt"))
    held = {
        tuple(map(int, path.parent.name.removeprefix("mp_rank_").split("_"))): torch.load(path, weights_only=False)
        for path in paths
    }
    assert held, f"no rank files in {checkpoint}"
    yield held
    for path, content in zip(paths, held.values(), strict=True):
        torch.save(content, path)


def states(content: dict[str, Any]) -> Iterator[State]:
    """The model chunks of a rank's file."""
    for key, value in content.items():
        if key.startswith("model") and isinstance(value, dict):
            yield value


def in_state(change: Callable[[State], None]) -> Plant:
    """A fault in each model chunk of each rank."""

    def plant(checkpoint: Path) -> None:
        with rank_files(checkpoint) as files:
            before = [snapshot(state) for content in files.values() for state in states(content)]
            for content in files.values():
                for state in states(content):
                    change(state)
            after = [snapshot(state) for content in files.values() for state in states(content)]
            assert any(not same(one, other) for one, other in zip(before, after, strict=True)), "nothing was changed"

    return plant


def snapshot(state: State) -> State:
    return {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        value.shape == other[name].shape and torch.equal(value, other[name]) for name, value in one.items()
    )


def in_tensors(ending: str, change: Change) -> Plant:
    """A fault in every tensor whose name ends so."""

    def each(state: State) -> None:
        for name in [name for name in state if name.endswith(ending) and isinstance(state[name], torch.Tensor)]:
            state[name] = change(state[name]).contiguous()

    return in_state(each)


def removed(ending: str) -> Plant:
    """Tensors that are not there."""

    def each(state: State) -> None:
        for name in [name for name in state if name.endswith(ending)]:
            del state[name]

    return in_state(each)


def exchanged(one: str, other: str) -> Plant:
    """Two tensors of a state in each other's place."""

    def each(state: State) -> None:
        for name in [name for name in state if one in name and isinstance(state[name], torch.Tensor)]:
            mate = name.replace(one, other)
            state[name], state[mate] = state[mate].clone(), state[name].clone()

    return in_state(each)


def in_args(**changes: object) -> Plant:
    """A fault in the args of all ranks."""

    def plant(checkpoint: Path) -> None:
        with rank_files(checkpoint) as files:
            for content in files.values():
                assert isinstance(content["args"], Namespace)
                for name, value in changes.items():
                    assert getattr(content["args"], name) != value, f"{name} is {value} already"
                    setattr(content["args"], name, value)

    return plant


def both(*plants: Plant) -> Plant:
    """Several changes that make one fault."""

    def plant(checkpoint: Path) -> None:
        for one in plants:
            one(checkpoint)

    return plant


def between_ranks(choose: Callable[[str], bool], one: tuple[int, ...], other: tuple[int, ...]) -> Plant:
    """The chosen tensors of two ranks in each other's place."""

    def plant(checkpoint: Path) -> None:
        with rank_files(checkpoint) as files:
            left, right = files[one]["model"], files[other]["model"]
            names = [name for name in left if choose(name) and isinstance(left[name], torch.Tensor)]
            assert any(not torch.equal(left[name], right[name]) for name in names)
            for name in names:
                left[name], right[name] = right[name], left[name]

    return plant


def in_directory(change: Callable[[State], None]) -> Plant:
    """A fault in the tensors of a Hugging Face directory."""

    def plant(directory: Path) -> None:
        file = directory / "model.safetensors"
        state = load_file(file)
        before = snapshot(state)
        change(state)
        assert not same(before, state), "nothing was changed"
        save_file({name: value.contiguous() for name, value in state.items()}, file, {"format": "pt"})

    return plant


def in_config(**changes: object) -> Plant:
    """A fault in config.json; None removes an entry."""

    def plant(directory: Path) -> None:
        file = directory / "config.json"
        config = json.loads(file.read_text())
        before = dict(config)
        config |= changes
        config = {name: value for name, value in config.items() if not (name in changes and value is None)}
        assert config != before, "nothing was changed"
        file.write_text(json.dumps(config))

    return plant


def flipped(bit: int) -> Change:
    """One bit of the largest element of a tensor in fp32."""

    def change(value: torch.Tensor) -> torch.Tensor:
        result = value.clone()
        bits = result.view(torch.int32).view(-1)
        bits[int(value.abs().argmax())] ^= 1 << bit
        return result

    return change
