"""Logits of a Hugging Face directory, computed by transformers itself. No code of the directory is run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from shardtool.errors import CheckpointError
from shardtool.verify.dequantised import loadable
from shardtool.verify.outputs import Outputs

Attention = Literal["eager", "sdpa"]

SHOWN = 8


def run(
    directory: Path,
    prompts: Sequence[Sequence[int]],
    traced: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "eager",
) -> Outputs:
    """Load the model in `dtype`, run each prompt by itself, keep hidden states at the `traced` positions.

    Raises CheckpointError when transformers cannot load the directory, or reports tensors as missing (tied ones are
    not), unexpected or of another shape.
    """
    model = load(directory, dtype=dtype, attention=attention)
    logits, hidden = [], []
    with torch.inference_mode():
        for prompt, positions in zip(prompts, traced, strict=True):
            result = model(input_ids=torch.tensor([list(prompt)]), output_hidden_states=True, use_cache=False)
            logits.append(result.logits[0].float())
            hidden.append(torch.stack([state[0, list(positions)].float() for state in result.hidden_states]))
    return Outputs(torch.cat(logits), torch.cat(hidden, dim=1))


def load(directory: Path, *, dtype: torch.dtype = torch.float32, attention: Attention = "eager") -> Any:
    """The causal language model of a directory, complete, in evaluation mode. Raises CheckpointError as `run` does.

    Multi-token-prediction layers, numbered on after the last layer, are unexpected to transformers: it has no code for
    them, and the logits do not depend on them.
    """
    auto: Any = AutoModelForCausalLM  # parts of transformers have no types
    try:
        with _quiet(), loadable(directory) as place:
            model, info = auto.from_pretrained(
                str(place),
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                # reported below with the keys by name, instead of raised with advice that fits training
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever transformers and torch say of a config that they do not like
        raise CheckpointError(
            "transformers cannot load the directory",
            where=str(directory),
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            hint="see what transformers says: AutoModelForCausalLM.from_pretrained(DIR)",
        ) from error
    details = []
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = [item[0] if isinstance(item, tuple) else str(item) for item in info.get(what) or ()]
        found = [name for name in found if what != "unexpected_keys" or not _multi_token(name, model.config)]
        details += [f"{what.split('_')[0]}: {name}" for name in sorted(found)[:SHOWN]]
        if len(found) > SHOWN:
            details.append(f"{what.split('_')[0]}: and {len(found) - SHOWN} more")
    if details:
        raise CheckpointError(
            "the directory's tensors are not those of its model",
            where=str(directory),
            details=tuple(details),
            hint="compare config.json with the tensors: `shardtool inspect` shows both",
        )
    return model.eval()


def _multi_token(name: str, config: Any) -> bool:
    first, count = getattr(config, "num_hidden_layers", 0), getattr(config, "num_nextn_predict_layers", 0) or 0
    return name.startswith(tuple(f"model.layers.{layer}." for layer in range(first, first + count)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers: what they say is reported as an error here, or not at all."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
