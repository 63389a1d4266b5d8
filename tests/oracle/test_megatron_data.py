"""Checkpoints that megatron-core itself saved, of five versions: exported, they give the logits of the saving model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import done

DATA = Path(__file__).parents[1] / "data" / "megatron-core"
LARGEST = 1e-4
SAVED = [
    (version, kind)
    for version in ("0.14.0", "0.15.3", "0.16.1", "0.19.2", "0.19.2-te")
    for kind in ("dense", "tied")
    if (version, kind) != ("0.19.2-te", "tied")
]
FORMATS = ("torch", "torch_dist")


def ratio_to_the_savers_logits(directory: Path, stored: dict[str, torch.Tensor]) -> float:
    """max |delta logit| / std(logits) of a Hugging Face directory, at every position."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(stored["ids"]).logits
    assert logits.shape == stored["logits"].shape
    return float((logits - stored["logits"]).abs().max() / stored["logits"].std())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("version", "kind"), SAVED)
def test_exported_it_gives_the_logits_of_the_saving_model(version: str, kind: str, form: str, tmp_path: Path) -> None:
    saved = DATA / version / kind
    done("megatron2hf", saved / form, tmp_path / "hf", "-q")
    stored = torch.load(saved / "logits.pt")
    assert ratio_to_the_savers_logits(tmp_path / "hf", stored) <= LARGEST
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 120
    assert config["rope_theta"] == 500000
    assert config["tie_word_embeddings"] is (kind == "tied")
    assert config["model_type"] == ("qwen2" if kind == "tied" else "llama")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("version", "kind"), SAVED)
def test_inspected(version: str, kind: str, form: str) -> None:
    facts = done("inspect", DATA / version / kind / form, "--json").json
    assert facts["problem"] is None
    assert facts["format"] == f"Megatron {form}"
    assert facts["save"] == "iter_0000100"
    assert (facts["layout"]["tp"], facts["layout"]["pp"]) == (2, 2)
    assert facts["padded_vocab"] == 128
    assert facts["model"]["num_layers"] == 4
    assert facts["dtypes"].keys() == {"float32"}


@pytest.mark.parametrize(("version", "kind"), SAVED)
def test_both_formats_of_a_save_are_one_model(version: str, kind: str) -> None:
    saved = DATA / version / kind
    report = done(
        "verify", saved / "torch", saved / "torch_dist", "--level", "accounting", "--level", "exact", "--json"
    ).json
    assert report["same"] is True
    assert report["levels"][-1]["elements"] > 38_000


def tensors_of_the_ranks(root: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every weight of every rank's file."""
    found = {}
    for file in sorted(root.glob("*/mp_rank_*/model_optim_rng.pt")):
        model = torch.load(file, weights_only=False)["model"]
        found |= {(file.parent.name, key): value for key, value in model.items() if not key.endswith("_extra_state")}
    return found


@pytest.mark.parametrize(("version", "kind"), SAVED)
def test_resharded_there_and_back_every_rank_has_its_tensors_again(version: str, kind: str, tmp_path: Path) -> None:
    start = DATA / version / kind / "torch"
    done("reshard", start, tmp_path / "dist", "--format", "torch_dist", "--tp", 1, "--pp", 4, "-q")
    assert (tmp_path / "dist" / "iter_0000100").is_dir()
    there = ("--format", "torch", "--tp", 2, "--pp", 2, "--vocab-divisible-by", 64)  # the saver's 128 rows at tp 2
    done("reshard", tmp_path / "dist", tmp_path / "back", *there, "-q")
    expected, found = tensors_of_the_ranks(start), tensors_of_the_ranks(tmp_path / "back")
    assert found.keys() == expected.keys()
    for place, tensor in expected.items():
        assert torch.equal(found[place], tensor), place
