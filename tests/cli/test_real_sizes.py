"""`plan` for the real DeepSeek-V3 from its config and headers alone: files without payload, 671 B parameters."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest

from commands import done
from shardtool.convert import MegatronOptions, prepare_hf2megatron
from shardtool.layout.mesh import Mesh

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from plans import DEEPSEEK_V3, DEEPSEEK_V3_LAYOUT, sparse_checkpoint

MESH = Mesh(tp=2, pp=16, ep=32, first_stage_layers=4, last_stage_layers=1)

# by hand: 61 layers, 3 of them dense; the MTP layer is one more with experts, and repeats embedding and head
HIDDEN, VOCAB, EXPERTS = 7168, 129280, 256
LATENT = 1536 * HIDDEN + 1536 + 128 * 192 * 1536 + 576 * HIDDEN + 512 + 128 * 256 * 512 + HIDDEN * 128 * 128
EVERY_LAYER = 2 * HIDDEN + LATENT
DENSE, EXPERT_LAYER = 3 * 18432 * HIDDEN, (EXPERTS + 1) * 3 * 2048 * HIDDEN + EXPERTS * HIDDEN + EXPERTS
MAIN = 2 * VOCAB * HIDDEN + HIDDEN + 61 * EVERY_LAYER + 3 * DENSE + 58 * EXPERT_LAYER
MTP_ALONE = 3 * HIDDEN + 2 * HIDDEN * HIDDEN + EVERY_LAYER + EXPERT_LAYER
BIASES = 59 * EXPERTS  # fp32, all else bf16
TENSORS = 3 + 61 * 9 + 3 * 3 + 58 * (3 * EXPERTS + 5) + 9 + (3 * EXPERTS + 5) + 4 + 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("deepseek") / "model"
    return path, sparse_checkpoint(path, DEEPSEEK_V3)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_the_bytes_of_the_plan_are_those_of_the_checkpoint(form: str, model: tuple[Path, int]) -> None:
    assert 671e9 < MAIN < 672e9
    path, total = model
    assert total == 2 * (MAIN + MTP_ALONE + 2 * VOCAB * HIDDEN) + 2 * BIASES
    prepared = prepare_hf2megatron(path, MegatronOptions(mesh=MESH, format=form))
    assert prepared.source.nbytes == total
    assert len(prepared.source.headers) == TENSORS
    plan = prepared.plan
    assert not plan.fills and not plan.cuts  # 129280 rows are a multiple of 2 x 128
    primary = [copy for copy in plan.copies if not copy.dst.replica]
    assert sum(copy.volume * prod(len(loop.ids) for loop in copy.loops) for copy in primary) == MAIN + MTP_ALONE
    assert len(prepared.target.skeletons) == 16 * 2 * 32 + (form == "torch_dist")


def test_what_is_shown(model: tuple[Path, int]) -> None:
    text = done("plan", "hf2megatron", model[0], "--format", "torch", *DEEPSEEK_V3_LAYOUT.split()).out
    assert "1024 files" in text
    assert "model.layers.61.mlp.experts.{0-255}.down_proj.weight -> mtp.layers.0." in text
