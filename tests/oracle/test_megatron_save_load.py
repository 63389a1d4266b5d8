"""Real ranks of the installed megatron-core: what they save, shardtool reads; what shardtool writes, they load.

Four gloo processes (tests/oracle/ranks.py) do all of it in one run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import convert, done
from ranks import Task
from shardtool.checkpoint.huggingface import open_huggingface
from shardtool.families.architecture import Architecture, MixtureOfExperts, Rope, RopeScaling
from shardtool.formats.torch_dist import read_metadata
from shardtool.layout.mesh import Mesh

LARGEST = 1e-4
WORLD = 4
VOCAB = 120
IDS = tuple(tuple((7 * row + step * (2 * row + 3)) % VOCAB for step in range(24)) for row in range(2))

LLAMA = Architecture("", 4, 64, 8, 2, 8, 96, VOCAB, 64, rope=Rope(500000.0))
SAVED = {
    "llama": LLAMA,
    "llama3": Architecture(
        "", 4, 64, 8, 4, 8, 96, VOCAB, 64, tied=True, rope=Rope(5e5, scaling=RopeScaling("llama3", 8.0)),
    ),
    "mistral": Architecture("", 4, 64, 8, 4, 16, 96, VOCAB, 64, window=8),
    "qwen2": Architecture("", 4, 64, 8, 4, 8, 96, VOCAB, 64, norm_eps=1e-6, qkv_bias=True, tied=True, rope=Rope(1e6)),
    "qwen3": Architecture("", 4, 64, 8, 4, 16, 96, VOCAB, 64, norm_eps=1e-6, qk_norm=True, rope=Rope(1e6)),
    "gpt2": Architecture(
        "", 4, 64, 8, 8, 8, 256, VOCAB, 64, norm="layer", activation="gelu_tanh", gated=False, qkv_bias=True,
        linear_bias=True, tied=True, rope=None,
    ),
    "mixtral": Architecture(
        "", 4, 64, 8, 4, 8, 96, VOCAB, 64, rope=Rope(1e6), moe=MixtureOfExperts(4, 2, 96, (0, 1, 2, 3)),
    ),
}  # fmt: skip
SINGLETON = ("llama", "mixtral")  # saved with singleton_local_shards too: a key per half and per expert
LOADED = ("llama", "qwen2_tied", "qwen3", "gpt2")
ELSEWHERE = (Mesh(tp=4, pp=1), Mesh(tp=1, pp=2), Mesh(tp=2, pp=2))


def at(mesh: Mesh) -> str:
    return f"tp{mesh.tp}-pp{mesh.pp}"


@pytest.fixture(scope="module")
def run(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run: SAVED/torch, SAVED/torch_dist, SAVED/singleton, SAVED.logits; and logits of what was loaded."""
    root = tmp_path_factory.mktemp("ranks")
    for name in SINGLETON:
        (root / name / "singleton").mkdir(parents=True)
    tasks = [Task("save", a, Mesh(tp=2, pp=2), root / name, root / f"{name}.logits", IDS) for name, a in SAVED.items()]
    for name in LOADED:
        a = open_huggingface(tiny_model(name)).opened.architecture
        modern = convert(tiny_model(name), root / f"{name}-dist", "--format", "torch_dist", "--tp", 2, "--pp", 2)
        legacy = convert(
            tiny_model(name), root / f"{name}-legacy", "--format", "torch", "--spec", "local", "--tp", 2, "--pp", 2
        )
        tasks += [
            Task("load_torch_dist", a, mesh, modern / "release", root / f"{name}-dist-{at(mesh)}.logits", IDS)
            for mesh in ELSEWHERE
        ]
        tasks.append(Task("load_torch", a, Mesh(tp=2, pp=2), legacy / "release", root / f"{name}-legacy.logits", IDS))
    torch.save(tasks, root / "tasks.pt")
    script = Path(__file__).with_name("ranks.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = []
    for rank in range(WORLD):
        command = [sys.executable, str(script), str(rank), str(WORLD), str(root / "store"), str(root / "tasks.pt")]
        with (root / f"rank{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=root))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        logs = "\n".join((root / f"rank{rank}.log").read_text()[-3000:] for rank in range(WORLD) if codes[rank])
        pytest.fail(f"the ranks ended with {codes}\n{logs}", pytrace=False)
    return root


def logits_of(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


def ratio(found: torch.Tensor, reference: torch.Tensor) -> float:
    assert found.shape == reference.shape
    return float((found - reference).abs().max() / reference.std())


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in SAVED for form in ("torch", "torch_dist")] + [(name, "singleton") for name in SINGLETON],
)
def test_what_megatron_core_saves_is_exported_to_its_logits(run: Path, name: str, form: str, tmp_path: Path) -> None:
    done("megatron2hf", run / name / form, tmp_path / "hf", "-q")
    assert ratio(logits_of(tmp_path / "hf"), torch.load(run / f"{name}.logits")) <= LARGEST


def test_singleton_shards_have_keys_of_their_own(run: Path) -> None:
    names = set(read_metadata(run / "mixtral" / "singleton" / "iter_0000100").tensors)
    assert "decoder.layers.3.mlp.experts.experts.2.linear_fc1.weight_v" in names
    assert (
        "decoder.layers.0.mlp.linear_fc1.weight_w"
        in read_metadata(run / "llama" / "singleton" / "iter_0000100").tensors
    )


@pytest.mark.parametrize("name", SAVED)
def test_both_formats_of_the_save_are_one_model(run: Path, name: str) -> None:
    levels = ("--level", "accounting", "--level", "exact")
    assert done("verify", run / name / "torch", run / name / "torch_dist", *levels, "--json").json["same"] is True


@pytest.mark.parametrize("mesh", ELSEWHERE, ids=at)
@pytest.mark.parametrize("name", LOADED)
def test_megatron_core_loads_torch_dist_with_its_default_strictness(
    run: Path, name: str, mesh: Mesh, tiny_model: Callable[[str], Path]
) -> None:
    assert ratio(torch.load(run / f"{name}-dist-{at(mesh)}.logits"), logits_of(tiny_model(name))) <= LARGEST


@pytest.mark.parametrize("name", LOADED)
def test_megatron_core_loads_per_rank_files_strictly(run: Path, name: str, tiny_model: Callable[[str], Path]) -> None:
    assert ratio(torch.load(run / f"{name}-legacy.logits"), logits_of(tiny_model(name))) <= LARGEST


# The state dict of real Transformer Engine 2.20 modules in megatron-core 0.16.1, tp 1 pp 1; {l} is the layer. Without
# core_attention._extra_state: Transformer Engine does not miss it (its load hook drops it from the missing keys).
TE_KEYS = [
    "embedding.word_embeddings.weight",
    "decoder.layers.{l}.self_attention.linear_proj.weight",
    "decoder.layers.{l}.self_attention.linear_proj._extra_state",
    "decoder.layers.{l}.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.{l}.self_attention.linear_qkv.weight",
    "decoder.layers.{l}.self_attention.linear_qkv._extra_state",
    "decoder.layers.{l}.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.{l}.mlp.linear_fc1.weight",
    "decoder.layers.{l}.mlp.linear_fc1._extra_state",
    "decoder.layers.{l}.mlp.linear_fc2.weight",
    "decoder.layers.{l}.mlp.linear_fc2._extra_state",
    "decoder.final_layernorm.weight",
    "decoder.final_layernorm._extra_state",
    "output_layer.weight",
    "output_layer._extra_state",
]
TE_QK_NORM_KEYS = [
    "decoder.layers.{l}.self_attention.q_layernorm.weight",
    "decoder.layers.{l}.self_attention.q_layernorm._extra_state",
    "decoder.layers.{l}.self_attention.k_layernorm.weight",
    "decoder.layers.{l}.self_attention.k_layernorm._extra_state",
]


@pytest.mark.parametrize(
    ("name", "more"),
    [("llama", []), ("qwen3", TE_QK_NORM_KEYS), ("qwen2", ["decoder.layers.{l}.self_attention.linear_qkv.bias"])],
)
def test_the_keys_are_those_of_transformer_engine(name: str, more: list[str], megatron: Callable[..., Path]) -> None:
    file = megatron(name, "torch", "te", 1, 1) / "release" / "mp_rank_00" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(file, weights_only=True)
    names = [re.sub(r"(?<=decoder\.layers\.)\d+", "{l}", key) for key in state["model"]]
    assert sorted(set(names)) == sorted([*TE_KEYS, *more])
    assert len(state["model"]) == sum(4 if "{l}" in key else 1 for key in [*TE_KEYS, *more])
