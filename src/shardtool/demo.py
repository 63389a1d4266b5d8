"""The whole story on a tiny model: built, converted, looked at, verified, resharded, brought back."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 120,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def run_demo(work: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it in `work` (a temporary directory when None): the commands, what they printed, and the verdict."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        return _story(work, say)
    with tempfile.TemporaryDirectory(prefix="shardtool-demo-") as directory:
        return _story(Path(directory), say)


def _story(work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from shardtool import tiny  # noqa: PLC0415 - heavy

    say("building a tiny Llama with noisy weights")
    model = tiny.build(TINY, work / "model")
    steps: list[dict[str, Any]] = []
    for fmt in ("torch", "torch_dist"):
        megatron, other, back = work / f"{fmt}-tp2-pp2", work / f"{fmt}-tp1-pp4", work / f"{fmt}-back"
        for command in (
            ["hf2megatron", str(model), str(megatron), "--tp", "2", "--pp", "2", "--format", fmt],
            ["inspect", str(megatron)],
            ["verify", str(model), str(megatron)],
            ["reshard", str(megatron), str(other), "--tp", "1", "--pp", "4"],
            ["megatron2hf", str(other), str(back), "--hf", str(model)],
            ["verify", str(model), str(back)],
        ):
            say("$ shardtool " + " ".join(command))
            code, lines = _run(command)
            steps.append({"command": "shardtool " + " ".join(command), "exit_code": code, "lines": lines})
            if code:
                return {"same": False, "verdict": f"failed: {steps[-1]['command']}", "steps": steps}
    return {"same": True, "verdict": "the model came back bit-identical, through both formats", "steps": steps}


def _run(command: list[str]) -> tuple[int, list[str]]:
    """One command in this process, so that the oracle's processes start only once."""
    from shardtool.cli import console  # noqa: PLC0415
    from shardtool.cli.main import run  # noqa: PLC0415

    settings = dict(vars(console.SETTINGS))
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            run([*command, "-q"])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        vars(console.SETTINGS).update(settings)
    return code, out.getvalue().splitlines()
