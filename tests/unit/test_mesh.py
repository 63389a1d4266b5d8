"""Pipeline splits, with megatron-core itself as the oracle: the same splits, the same refusals."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool.errors import UsageError
from shardtool.layout.mesh import Mesh, chunks, padded_vocab, parse_pipeline_layout, virtual_stages
from worlds import layout_strings


@pytest.fixture(scope="module")
def megatron():
    """megatron-core's split: (mesh, layers, mtp) -> the layer ids of each (vpp, pp), or None where it refuses."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    def split(mesh: Mesh, num_layers: int, mtp: int = 0):
        import torch

        try:
            config = TransformerConfig(
                num_layers=num_layers,
                hidden_size=8,
                num_attention_heads=2,
                pipeline_model_parallel_size=mesh.pp,
                virtual_pipeline_model_parallel_size=mesh.vpp if mesh.vpp > 1 else None,
                num_layers_in_first_pipeline_stage=mesh.first_stage_layers,
                num_layers_in_last_pipeline_stage=mesh.last_stage_layers,
                account_for_embedding_in_pipeline_split=mesh.account_for_embedding,
                account_for_loss_in_pipeline_split=mesh.account_for_loss,
                pipeline_model_parallel_layout=mesh.pipeline_layout,
                mtp_num_layers=mtp or None,
                pipeline_dtype=torch.float32,
            )
            vpp = config.virtual_pipeline_model_parallel_size or 1
            if vpp > 1:
                parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp)
            parallel_state.set_pipeline_model_parallel_world_size(mesh.pp)
            found = []
            for stage in range(vpp):
                for pp in range(mesh.pp):
                    parallel_state.set_pipeline_model_parallel_rank(pp)
                    at = stage if vpp > 1 else None
                    start = get_transformer_layer_offset(config, at, pp)
                    count = get_num_layers_to_build(config, at, pp)
                    found.append(((stage, pp), tuple(range(start, start + count))))
        except (AssertionError, ValueError, ZeroDivisionError):
            return None
        finally:
            parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
            parallel_state.set_pipeline_model_parallel_world_size(None)
            parallel_state.set_pipeline_model_parallel_rank(None)
        # it does not look whether first + last stage exceed all layers
        every = [layer for _, layers in found for layer in layers]
        return found if every == list(range(num_layers)) else None

    return split


def ours(mesh: Mesh, num_layers: int, mtp: int = 0):
    try:
        return [((chunk.vpp, chunk.pp), chunk.layers) for chunk in chunks(mesh, num_layers, mtp)]
    except UsageError:
        return None


def test_splits_are_megatrons(megatron):
    """Every combination of small numbers: same layers, and refused where megatron-core refuses."""
    accepted = 0
    for pp, vpp, layers in product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 6, 7, 8, 12)):
        for first, last in product((None, 0, 1, 2, 3, 4), repeat=2):
            for embedding, loss in product((False, True), repeat=2):
                mesh = Mesh(1, pp, vpp, 1, None, first, last, embedding, loss)
                if pp == 1 and (vpp > 1 or first is not None or last is not None):
                    continue  # Megatron-LM's arguments.py refuses these before megatron-core sees them
                expected = megatron(mesh, layers)
                assert ours(mesh, layers) == expected, (mesh, layers)
                accepted += expected is not None
    assert accepted > 300


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_layout_strings_are_megatrons(megatron, data):
    layers = data.draw(st.integers(1, 6))
    pp, text = data.draw(layout_strings(layers))
    for count in (3, 2):  # spell some runs as repeats
        if data.draw(st.booleans()):
            text = text.replace("t" * count, f"t*{count}", 1)
    if data.draw(st.booleans()):
        text = text.replace("t|t|", "(t|)*2", 1).replace("|", ",|", 1)
    mtp = data.draw(st.integers(0, 2))
    text = text.replace("L", "m" * mtp + "L")
    if data.draw(st.booleans()):  # one character more, less or other: mostly refused
        at = data.draw(st.integers(0, len(text) - 1))
        letter = data.draw(st.sampled_from([*"EtmL|,()*2x", ""]))
        text = text[:at] + letter + text[at + data.draw(st.integers(0, 1)) :]
    mesh = Mesh(pp=pp, pipeline_layout=text)
    expected = megatron(mesh, layers, mtp)
    if expected is not None and pp == 1 and len(expected) > 1:
        expected = None  # virtual stages of one pipeline stage: refused by Megatron-LM's arguments.py
    assert ours(mesh, layers, mtp) == expected, (mesh, layers, mtp)


def test_formulas():
    """reference: chunk c of stage p starts at c * (L / v) + p * (L / PP / v)."""
    layers = {(chunk.pp, chunk.vpp): chunk.layers for chunk in chunks(Mesh(pp=2, vpp=2), 8)}
    assert layers == {(0, 0): (0, 1), (1, 0): (2, 3), (0, 1): (4, 5), (1, 1): (6, 7)}
    for pp, vpp in ((2, 3), (4, 2), (3, 1)):
        for chunk in chunks(Mesh(pp=pp, vpp=vpp), 24):
            start = chunk.vpp * (24 // vpp) + chunk.pp * (24 // pp // vpp)
            assert chunk.layers == tuple(range(start, start + 24 // pp // vpp))


def test_ends_of_the_pipeline():
    found = chunks(Mesh(pp=2, vpp=2), 8, mtp_layers=1)
    assert [(chunk.embedding, chunk.head, chunk.mtp) for chunk in found] == [
        (True, False, False),
        (False, False, False),
        (False, False, False),
        (False, True, True),
    ]
    assert not any(chunk.mtp for chunk in chunks(Mesh(pp=2), 8))


def test_llama_405b():
    """126 layers over 16 stages: fewer layers on the two ends."""
    counts = [
        len(chunk.layers) for chunk in chunks(Mesh(pp=16, account_for_embedding=True, account_for_loss=True), 126)
    ]
    assert counts == [7, *[8] * 14, 7]
    assert counts == [len(c.layers) for c in chunks(Mesh(pp=16, first_stage_layers=7, last_stage_layers=7), 126)]


def test_deepseek_layout():
    text = "Et*3|(tt|)*29,m|L"
    assert parse_pipeline_layout(text)[:3] == ["Ettt", "tt", "tt"]
    found = chunks(Mesh(pp=16, pipeline_layout=text), 61, mtp_layers=1)
    assert len(found) == 32
    assert [chunk.mtp for chunk in found].index(True) == 30
    assert found[-1].layers == ()
    assert found[-1].head
    assert virtual_stages(Mesh(pp=16, pipeline_layout=text)) == 2
    assert virtual_stages(Mesh(pp=16, vpp=3)) == 3


@pytest.mark.parametrize(
    ("mesh", "layers", "message"),
    [
        (Mesh(tp=0), 4, "--tp must be at least 1"),
        (Mesh(pp=-1), 4, "--pp must be at least 1"),
        (Mesh(pp=3), 4, "4 layers do not divide over 3 pipeline stages"),
        (Mesh(pp=2, vpp=3), 4, "2 layers of pipeline stage 0 do not divide over 3 virtual stages"),
        (Mesh(vpp=2), 4, "virtual stages need more than one pipeline stage"),
        (Mesh(first_stage_layers=2), 4, "need more than one pipeline stage"),
        (Mesh(pp=2, first_stage_layers=0), 4, "must be at least 1"),
        (Mesh(pp=2, first_stage_layers=5), 4, "do not divide"),
        (Mesh(pp=2, first_stage_layers=1, last_stage_layers=1), 4, "do not divide"),
        (Mesh(pp=3, first_stage_layers=2, last_stage_layers=2), 4, "do not divide"),
        (Mesh(pp=2, vpp=2, first_stage_layers=2, last_stage_layers=2), 4, "cannot number the layers"),
        (Mesh(pp=2, first_stage_layers=3, account_for_loss=True), 4, "exclude each other"),
        (Mesh(pp=2, vpp=2, account_for_embedding=True, account_for_loss=True), 4, "do not divide"),
        (Mesh(pp=1, account_for_embedding=True, account_for_loss=True), 0, None),
        (Mesh(pp=2, vpp=1, account_for_embedding=True, account_for_loss=True), 0, None),
        (Mesh(pp=1, account_for_loss=True), -1, "less than no layers"),
        (Mesh(pipeline_layout="EttxL"), 4, "unknown letter"),
        (Mesh(pipeline_layout="EttttL", account_for_loss=True), 4, "says all about the split"),
        (Mesh(pipeline_layout="EttttL", last_stage_layers=1), 4, "says all about the split"),
        (Mesh(pp=2, pipeline_layout="Ett|tt|L"), 4, "do not divide by pp"),
        (Mesh(pipeline_layout="Ett|ttL"), 4, "virtual stages need more than one pipeline stage"),
        (Mesh(pp=2, vpp=2, pipeline_layout="Ett|ttL"), 4, "another number of virtual stages"),
        (Mesh(pipeline_layout="EtttL"), 4, "wrong number of layers"),
        (Mesh(pipeline_layout="EEttttL"), 4, "wrong number of embeddings"),
        (Mesh(pipeline_layout="EttttmL"), 4, "wrong number of MTP layers"),
        (Mesh(pipeline_layout="tEtttL"), 4, "must begin with the embedding"),
    ],
)
def test_refusals(mesh, layers, message):
    if message is None:
        assert all(chunk.layers == () for chunk in chunks(mesh, layers))
        return
    with pytest.raises(UsageError, match=message):
        chunks(mesh, layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Etm|tmL", "MTP layers come after"),
        ("Ett|m|m|L", "all MTP layers sit in one stage"),
        ("Ett|mm||L", "all MTP layers sit in one stage"),
    ],
)
def test_mtp_refusals(text, message):
    with pytest.raises(UsageError, match=message):
        chunks(Mesh(pp=2, pipeline_layout=text), 2, mtp_layers=2)


def test_expert_tp():
    assert Mesh(tp=4).expert_tp == 4
    assert Mesh(tp=4, etp=1).expert_tp == 1


@pytest.mark.parametrize(
    ("vocab", "divisible_by", "tp", "rows"),
    [(32000, 128, 1, 32000), (128256, 128, 8, 129024), (50257, 128, 2, 50432), (7, 1, 4, 8), (8, 1, 4, 8)],
)
def test_padded_vocab(vocab, divisible_by, tp, rows):
    assert padded_vocab(vocab, divisible_by, tp) == rows
