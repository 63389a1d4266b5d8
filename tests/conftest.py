"""Models that many tests share: each is built once per session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import results
from commands import convert
from shardtool import tiny
from shardtool.errors import UsageError

# tiny models: a second thread costs more than it brings, and spins on the core that the oracle's processes need
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell's background jobs have Ctrl-C ignored, and so would all that tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CONFIGS = Path(__file__).parents[1] / "configs" / "tiny"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model("qwen2")` is the Hugging Face directory of configs/tiny/qwen2.json. Read it, do not change it."""
    root = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = tiny.build(CONFIGS / f"{name}.json", root / name)
        return built[name]

    return get


@pytest.fixture(scope="session")
def megatron(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`megatron("qwen2", "torch", "te", 2, 1)` is that tiny model converted: format, spec, tp, pp. Do not change it."""
    root = tmp_path_factory.mktemp("megatron")

    def get(name: str, form: str = "torch", spec: str = "te", tp: int = 1, pp: int = 1) -> Path:
        out = root / f"{name}-{form}-{spec}-tp{tp}-pp{pp}"
        if not out.exists():
            convert(tiny_model(name), out, "--format", form, "--spec", spec, "--tp", tp, "--pp", pp)
        return out

    return get


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory. Read it, do not change it."""
    try:
        return tiny.smollm2(tmp_path_factory.mktemp("smollm2") / "hf")
    except UsageError as error:
        pytest.fail(f"{error}\nscripts/test installs what this test needs", pytrace=False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Results of tests with an oracle of their own."""
    if report.when == "call" and report.passed:
        results.of_properties(report.user_properties)


def pytest_sessionfinish() -> None:
    """Write the results, if asked; end the worker processes of the logits verifier, if a test has started them."""
    results.write()
    pool = sys.modules.get("shardtool.verify.pool")
    if pool is not None:
        pool.close_pools()
