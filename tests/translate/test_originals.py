"""Families that transformers does not ship: the original's forward in plain torch against what was written, as a Llama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import edit_config, edit_tensors, logits, prompts, ratio
from originals import DIM, FFN, GROUPS, HEADS, ORIGINALS, State, weights
from safetensors.torch import save_file
from torch import Tensor

from commands import done

VERDICTS = {
    "qwen": ("conditional", "identical"),
    "baichuan": ("identical", "identical"),
    "baichuan 2": ("exact", "exact"),
    "internlm2": ("identical", "identical"),
    "chatglm": ("exact", "exact"),
    "minicpm": ("exact", "exact"),
    "internlm": ("conditional", "identical"),
}


def written(name: str, out: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Path, Tensor]:
    """A random model of the family, and its logits by the original's forward."""
    config, shapes, forward = ORIGINALS[name]
    config = config | changes
    state = weights(shapes(config), dtype)
    out.mkdir(parents=True)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    vocab = config.get("vocab_size") or config["padded_vocab_size"]
    with torch.no_grad():
        return out, forward(state, config, prompts(vocab))


@pytest.mark.parametrize("name", ORIGINALS)
def test_as_llama(name: str, tmp_path: Path) -> None:
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        source, ours = written(name, tmp_path / f"in-{dtype}", dtype)
        out = tmp_path / f"out-{dtype}"
        verdict = done("translate", source, out, "--to", "llama", "-q", "--json").json["verdict"]
        assert (verdict["level"], verdict["within"]) == VERDICTS[name]
        assert ratio(ours, logits(out, dtype)) <= limit


def contiguous_wqkv(t: State) -> None:
    """InternLM2's wqkv cut as if all queries came first."""
    for n in range(2):
        at = f"model.layers.{n}.self_attn."
        q = t[at + "q_proj.weight"].view(GROUPS, -1, DIM, t[at + "q_proj.weight"].shape[-1])
        k, v = (t[at + f"{x}_proj.weight"].view(GROUPS, 1, DIM, -1) for x in "kv")
        packed = torch.cat([q, k, v], 1).flatten(0, 2)
        parts = packed.split([HEADS * DIM, GROUPS * DIM, GROUPS * DIM])
        for name, part in zip("qkv", parts, strict=True):
            t[at + f"{name}_proj.weight"] = part.clone()


def swapped_gate(t: State) -> None:
    """Qwen-1's w1 taken for the gate."""
    for n in range(2):
        at = f"model.layers.{n}.mlp."
        t[at + "gate_proj.weight"], t[at + "up_proj.weight"] = t[at + "up_proj.weight"], t[at + "gate_proj.weight"]


def without_permutation(t: State) -> None:
    """ChatGLM's rows of q and k left in its own order."""
    for n in range(2):
        for name in ("q_proj", "k_proj"):
            for kind in ("weight", "bias"):
                key = f"model.layers.{n}.self_attn.{name}.{kind}"
                heads = t[key].view(-1, 2, 2, DIM // 4, *t[key].shape[1:])  # half, rotated or not, pair
                rotated, rest = heads[:, :, 0], heads[:, :, 1]
                t[key] = torch.cat([rotated.transpose(1, 2).flatten(1, 2), rest.flatten(1, 2)], 1).flatten(0, 1)


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "contiguous wqkv": ("internlm2", lambda out: edit_tensors(out, contiguous_wqkv)),
    "gate and up swapped": ("qwen", lambda out: edit_tensors(out, swapped_gate)),
    "rope base forgotten": ("qwen", lambda out: edit_config(out, rope_theta=10000.0)),
    "rope_ratio forgotten": ("chatglm", lambda out: edit_config(out, rope_theta=10000.0**2)),
    "rows of q and k not permuted": ("chatglm", lambda out: edit_tensors(out, without_permutation)),
    "qkv biases dropped": ("chatglm", lambda out: edit_tensors(out, lambda t: [
        value.zero_() for name, value in t.items() if name.endswith("q_proj.bias")
    ])),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_published_bug_is_caught(fault: str, tmp_path: Path) -> None:
    name, plant = FAULTS[fault]
    source, ours = written(name, tmp_path / "in")
    done("translate", source, tmp_path / "out", "--to", "llama", "-q")
    assert ratio(ours, logits(tmp_path / "out", torch.float32)) <= 1e-4
    plant(tmp_path / "out")
    assert ratio(ours, logits(tmp_path / "out", torch.float32)) > 1e-2


def test_ffn_of_the_first_qwen_counts_both(tmp_path: Path) -> None:
    source, _ = written("qwen", tmp_path / "in")
    done("translate", source, tmp_path / "out", "--to", "llama", "-q")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == FFN
    assert config["max_position_embeddings"] == 64
