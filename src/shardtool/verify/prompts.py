"""What is fed to both models: random tokens of several lengths, and text where there is a tokenizer.

Every position of every prompt is compared, so a few prompts are thousands of comparisons over the vocabulary.
Random tokens are drawn without repetition until the vocabulary is used up: each exercises another embedding row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from shardtool.errors import UsageError

DEFAULT_MAX_TOKENS = 512
DEFAULT_LENGTHS = (1, 7, 33, 128)

# how far beyond a limit a prompt goes that is to show what the model does there
BEYOND = 8

TEXTS = (
    "The quick brown fox jumps over the lazy dog. In 1905 Einstein published four papers that changed physics.",
    "def add(a: int, b: int) -> int:\n    return a + b  # 1 + 2 == 3\n",
    "Übermut tut selten gut. 你好。 नमस्ते। 3.14159 ≠ 22/7",
)


class Limits(Struct, frozen=True):
    """What prompts may be: token ids below `vocab_size`, at most `max_positions` of them.

    `window` and `original_max_positions` are lengths at which the model changes its ways, where it has them.
    """

    vocab_size: int
    max_positions: int
    window: int | None = None
    original_max_positions: int | None = None


class PromptSet(Struct, frozen=True):
    """Token ids per prompt, and one line each on what they cover and what they do not."""

    prompts: tuple[tuple[int, ...], ...]
    coverage: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        """The number of positions of all prompts."""
        return sum(map(len, self.prompts))


def make_prompts(
    limits: Limits,
    *,
    seed: int = 0,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    tokenizer: Path | None = None,
) -> PromptSet:
    """Random prompts of `lengths`, one beyond each limit that fits into `max_tokens` in all, and texts.

    `max_tokens` bounds the time: a forward pass costs about 2 operations per weight and token. `tokenizer` is a
    directory with a Hugging Face tokenizer. Raises UsageError when nothing at all fits.
    """
    budget = max_tokens
    chosen: list[int] = []
    coverage: list[str] = []
    special = {
        "the attention window": limits.window,
        "the unscaled rope positions": limits.original_max_positions,
    }
    for name, limit in special.items():
        if limit is None or limit >= limits.max_positions:
            continue
        length = min(limit + BEYOND, limits.max_positions)
        covered = length <= budget
        coverage.append(
            f"{'covers' if covered else 'does not cover'} {name} (more than {limit} tokens"
            + (")" if covered else f", {budget} of {max_tokens} left)")
        )
        if covered:
            chosen.append(length)
            budget -= length
    for length in lengths:
        length = min(length, limits.max_positions)  # noqa: PLW2901
        if length <= budget and length not in chosen:
            chosen.append(length)
            budget -= length
    prompts = [*_random_prompts(chosen, limits.vocab_size, seed)]
    if tokenizer is not None:
        texts, line = _text_prompts(tokenizer, limits, budget)
        prompts += texts
        coverage.append(line)
    if not prompts:
        raise UsageError(
            "no prompt fits",
            expected="at least 1 token",
            found=f"--max-tokens {max_tokens}",
            hint="give a larger --max-tokens",
        )
    rows = len({token for prompt in prompts for token in prompt})
    coverage.insert(0, f"{rows} of {limits.vocab_size} embedding rows")
    return PromptSet(tuple(prompts), tuple(coverage))


def _random_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    generator = random.Random(seed)
    deck: list[int] = []
    prompts = []
    for length in lengths:
        while len(deck) < length:
            deck += generator.sample(range(vocab_size), min(vocab_size, max(length, 4096)))
        prompts.append(tuple(deck[:length]))
        del deck[:length]
    return prompts


def _text_prompts(directory: Path, limits: Limits, budget: int) -> tuple[list[tuple[int, ...]], str]:
    """Prompts from TEXTS, as many as fit, and the line that says so."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (heavy, and only with a tokenizer)

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        return [], f"no text: the tokenizer cannot be loaded ({str(error).splitlines()[0]})"
    prompts = []
    for text in TEXTS:
        ids = tuple(int(token) for token in tokenizer(text)["input_ids"])[: limits.max_positions]
        if ids and len(ids) <= budget and max(ids) < limits.vocab_size:
            prompts.append(ids)
            budget -= len(ids)
    return prompts, f"{len(prompts)} of {len(TEXTS)} texts"


def traced_positions(prompts: Sequence[Sequence[int]], limit: int = 48) -> tuple[tuple[int, ...], ...]:
    """The positions of each prompt whose hidden states are kept: all, or `limit` of them, evenly spread to the last.

    Hidden states after every layer of a long prompt would need more memory than the logits.
    """
    chosen = []
    for prompt in prompts:
        count = min(len(prompt), limit)
        last = len(prompt) - 1
        chosen.append(tuple(last * index // max(count - 1, 1) for index in range(count)) if count > 1 else (last,))
    return tuple(chosen)
