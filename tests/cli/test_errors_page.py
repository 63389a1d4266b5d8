"""docs/errors.md is what the tests of bad input have seen, and they have seen every error that an input can cause."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import error_sites
import errors_page

GUARD = "a guard against a bug of our own, which no input reaches"
RULES = "a rule of a family's table is wrong: the tables are code, and tests/unit tries these"
API = "the command line refuses it before; it is for callers from Python"
DEVICE = "needs a device that fails in the middle of a read, or a file that vanishes between two reads of it"
READER = "the reader refuses such a checkpoint before the judge's own loader: tests/oracle/test_judges_own_reader.py tries it"
VERDICT = "a reason of a verdict: docs/translate.md has those of all pairs of architectures"
WORKER = "made in a worker's process from an error that is on the page"
POOL = "needs a worker of verify that is killed or hangs: tests/oracle/test_logits.py"
NO_WORD = (
    "the args of a Megatron checkpoint have no word for it: tests/oracle/test_judges_own_reader.py makes such a model"
)

# Errors that no input of these tests causes, as path, path:function or path:function: text; and the reason
NOT_ON_THE_PAGE = {
    "checkpoint/limits.py:check_tied_mtp": "tests/cli/test_saved_layouts.py causes it, from a model that takes long to make",
    "cli/judging.py:demo": GUARD,
    "cli/main.py:_usage: {type(error).__name__}: {error}": GUARD,
    "cli/main.py:run": "the system refuses something outside of a conversion: needs a device that fails",
    "conversion.py:_write_last": GUARD,
    "convert.py:_check_options: (a text of its caller)": API,
    "convert.py:_check_options: --vocab-divisible-by": API,
    "convert.py:prepare_megatron2hf: --dtype": API,
    "families/family.py:Family.write_config": "its details are on the page, below what no architecture is",
    "families/mimo.py:": "hands on the reasons of Qwen2's table, which are on the page",
    "formats/pickle_out.py": GUARD,
    "formats/safetensors_files.py:read_header: (a text of its caller)": DEVICE,
    "formats/safetensors_files.py:skeleton": GUARD,
    "formats/small_files.py:open_file: (a text of its caller)": "a pipe that takes a file's place after it was looked at",
    "formats/small_files.py:read_small: (a text of its caller)": DEVICE,
    "formats/torch_dist.py:_pread": DEVICE,
    "formats/torch_zip.py:_Window.read: the file ends in the middle of the archive": DEVICE,
    "formats/torch_zip.py:_open: (a text of its caller)": DEVICE,
    "formats/torch_zip_out.py": GUARD,
    "layout/equation.py": RULES,
    "layout/megatron.py:_windows": RULES,
    "layout/megatron.py:held_ranks": "becomes the error that shards of the experts are missing",
    "layout/mesh.py:chunks: --{name} must be at least 1": API,
    "layout/mesh.py:chunks: a pipeline stage would have less than no layers": API,
    "layout/mesh.py:_from_layout_string: all MTP layers sit in one stage of the last virtual stage": (
        "needs two MTP layers, which no model here has"
    ),
    "layout/refine.py": RULES,
    "layout/rules.py": RULES,
    "plan/accounting.py:_refuse": GUARD,
    "tiny.py": "for tests and the demo, where a package is not installed",
    "translate/join.py": VERDICT,
    "translate/match.py:_read_back": VERDICT,
    "translate/norms.py:_centred": VERDICT,
    "translate/prepare.py:prepare_translate: (a text of its caller)": API,
    "translate/rotary.py:pair_sizes": VERDICT,
    "verify/dequantised.py:_values": READER,
    "verify/dist_metadata.py": READER,
    "verify/files.py": READER,
    "verify/huggingface.py:load: the directory's tensors are not those of its model": READER,
    "verify/logits.py:_config": READER,
    "verify/megatron_load.py:stored_embedding": READER,
    "verify/megatron_load.py:_load_file": READER,
    "verify/megatron_load.py:_model_chunk": READER,
    "verify/megatron_load.py:_load_torch_dist": WORKER,
    "verify/megatron_model.py:_mla_arguments: megatron-core's latent attention rounds yarn's correction range": NO_WORD,
    "verify/megatron_model.py:_position_arguments": NO_WORD,
    "verify/megatron_model.py:build_stage: megatron-core puts other layers into a stage than the layout does": GUARD,
    "verify/pool.py": POOL,
    "verify/prompts.py:make_prompts": API,
    "verify/worker.py:_together": WORKER,
    "verify/worker.py:run.measure": WORKER,
    "verify/worker.py:_answer": WORKER,
}


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> None:
    """All tests of bad input have run and passed."""
    modules = {Path(str(item.path)).stem for item in request.session.items}
    if not modules >= set(errors_page.SECTIONS) or request.session.testsfailed:
        pytest.skip("needs all tests of bad input in the same run, and all of them passed")


@pytest.mark.usefixtures("everything")
def test_every_error_is_on_the_page() -> None:
    """Or it is in the list of those that no input reaches, with the reason."""
    unseen = {site.name: site.function for site in error_sites.unseen()}
    lacking = [
        f"{name}"
        for name, function in unseen.items()
        if not {name, function, name.partition(":")[0]} & set(NOT_ON_THE_PAGE)
    ]
    text = "these errors need a test whose input causes them, or a reason why there is none:\n"
    assert not lacking, text + "\n".join(lacking)
    listed = set(unseen) | set(unseen.values()) | {name.partition(":")[0] for name in unseen}
    assert [name for name in NOT_ON_THE_PAGE if name not in listed] == [], (
        "these are on the page: take them off the list"
    )


@pytest.mark.usefixtures("everything")
def test_the_page_of_errors() -> None:
    """docs/errors.md holds what the tests of bad input have seen."""
    page = errors_page.render()
    if os.environ.get("SHARDTOOL_WRITE_PAGE"):
        errors_page.PAGE.write_text(page)
    assert errors_page.PAGE.read_text() == page, "docs/errors.md is stale: run scripts/errors-page"
