"""Configs: config.json to Architecture and back, and what transformers and Megatron-LM make of the same model."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from msgspec.structs import replace
from transformers import CONFIG_MAPPING

from shardtool.errors import CheckpointError, UsageError
from shardtool.families.architecture import Architecture, Folded, Rope, RopeScaling
from shardtool.families.blocks import axis_sizes, standard
from shardtool.families.exactness import inexact
from shardtool.families.family import TRAINING_ONLY, describe_differences
from shardtool.families.launch_flags import launch_flags, without_flag
from shardtool.families.megatron_args import from_args
from shardtool.families.megatron_args_out import to_args
from shardtool.families.refused import REFUSED
from shardtool.families.registry import FAMILIES, family_of, infer_family
from shardtool.families.rope import read_rope, write_rope
from shardtool.layout.huggingface import huggingface_layout
from shardtool.layout.mesh import Mesh

FOLDER = Path(__file__).parents[2] / "configs" / "tiny"
DENSE = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
CONFIGS = {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
NAMES = list(CONFIGS)
# some models come with code of their own; transformers has no class for them
IN_TRANSFORMERS = [name for name, config in CONFIGS.items() if config["model_type"] in CONFIG_MAPPING]


def read(config: dict) -> Architecture:
    return family_of(config).read_config(config)


def config_of(name: str, **changes: object) -> dict:
    return {**CONFIGS[name], **changes}


# ---------------------------------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_a_round_trip(name):
    a = read(CONFIGS[name])
    family = family_of(CONFIGS[name])
    written = family.write_config(a, "bfloat16")
    assert read(written) == a
    assert json.loads(json.dumps(written)) is not None
    assert written["torch_dtype"] == "bfloat16"
    assert written["architectures"] == CONFIGS[name]["architectures"]
    assert family.lost(a, written) == []


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if "rope_theta" in config])
def test_both_rope_dialects_say_the_same(name):
    """rope_theta and rope_scaling (transformers 4), rope_parameters (5), and the two at once."""
    old = CONFIGS[name]
    scaling = old.get("rope_scaling") or {"rope_type": "default"}
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**scaling, "rope_theta": old.get("rope_theta", 10000.0)}
    assert read(new) == read(old) == read({**old, **new})


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_reads_the_same_numbers(name, tiny_model):
    a = read(CONFIGS[name])
    for config in (
        CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict(CONFIGS[name]),
        CONFIG_MAPPING[a.family].from_dict(family_of(CONFIGS[name]).write_config(a, "float32")),
        CONFIG_MAPPING[a.family].from_pretrained(tiny_model(name)),
    ):
        agree(a, config)
    assert read(json.loads((tiny_model(name) / "config.json").read_text())) == a


def agree(a: Architecture, config) -> None:
    """An architecture and a transformers configuration are of one model."""
    assert a.num_layers == config.num_hidden_layers
    assert a.hidden_size == config.hidden_size
    assert a.num_heads == config.num_attention_heads
    assert a.vocab_size == config.vocab_size
    assert a.max_positions == config.max_position_embeddings
    assert (a.tied or (a.folded is not None and a.folded.tied)) == config.tie_word_embeddings
    if a.family == "gpt2":
        assert a.ffn_size == (config.n_inner or 4 * config.n_embd)
        assert a.norm_eps == config.layer_norm_epsilon
        assert (a.attention_dropout, a.hidden_dropout) == (config.attn_pdrop, config.resid_pdrop)
        assert {"gelu_tanh": "gelu_new", "gelu": "gelu"}[a.activation] == config.activation_function
        return
    if a.family == "opt":
        assert a.ffn_size == config.ffn_dim
        assert a.activation == config.activation_function
        assert (a.attention_dropout, a.hidden_dropout) == (config.attention_dropout, config.dropout)
        return
    if hasattr(config, "intermediate_size"):  # not where every layer has experts
        assert a.ffn_size == config.intermediate_size
    names = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
    assert a.norm_eps == next(getattr(config, name) for name in names if hasattr(config, name))
    assert a.num_query_groups == getattr(config, "num_key_value_heads", config.num_attention_heads)
    if not a.mla:  # where head_dim is another name for the rope dims
        assert a.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if a.family == "gpt_oss":
        assert (a.activation, config.hidden_act, a.clamp) == ("quick_gelu", "silu", config.swiglu_limit)
    else:
        assert a.activation == {"gelu_pytorch_tanh": "gelu_tanh"}.get(config.hidden_act, config.hidden_act)
    assert a.rope is not None
    assert a.rope.theta == config.rope_parameters["rope_theta"]
    assert a.rope.fraction == config.rope_parameters.get("partial_rotary_factor", 1.0)
    kind = a.rope.scaling.kind if a.rope.scaling else "default"
    assert kind == config.rope_parameters["rope_type"]
    if a.rope.scaling:
        assert a.rope.scaling.factor == config.rope_parameters["factor"]
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) and "sliding_attention" not in config.layer_types:
        window = None
    assert a.window == window
    if a.moe:
        names = ("n_routed_experts", "num_local_experts", "num_experts")
        assert a.moe.num_experts == next(getattr(config, name) for name in names if hasattr(config, name))
        assert a.moe.top_k == config.num_experts_per_tok
        assert a.moe.ffn_size == getattr(config, "moe_intermediate_size", getattr(config, "intermediate_size", None))
    if a.mla:
        latent = (config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim)
        assert latent == (a.mla.query_rank, a.mla.key_value_rank, a.mla.nope_dim, a.mla.rope_dim)
        assert a.mla.value_dim == config.v_head_dim


@pytest.mark.parametrize("name", DENSE)
def test_absent_keys_have_the_defaults_of_transformers(name):
    """A config.json that says nothing but the model_type."""
    agree(FAMILIES[name].read_config({"model_type": name}), CONFIG_MAPPING[name]())


def test_null_is_the_default_too():
    assert read(config_of("gpt2", n_inner=None)).ffn_size == 256
    assert read(config_of("llama", num_key_value_heads=None)).num_query_groups == 8
    assert read(config_of("mistral", num_key_value_heads=None)).num_query_groups == 8
    assert read(config_of("llama", rms_norm_eps=None)).norm_eps == 1e-6


def test_windows():
    assert read(config_of("mistral")).window == 8
    assert read(config_of("mistral_nemo")).window is None
    for name in ("qwen2", "qwen3"):
        sliding = {"use_sliding_window": True, "sliding_window": 8}
        assert read(config_of(name, **sliding, max_window_layers=0)).window == 8
        assert read(config_of(name, **sliding, max_window_layers=4)).window is None
        assert read(config_of(name, sliding_window=8)).window is None
        mixed = read(config_of(name, **sliding, max_window_layers=3))
        assert (mixed.window, mixed.window_layers) == (8, (3,))
        for types in (["sliding_attention"] * 4, ["full_attention", "sliding_attention"] * 2):
            a = read(config_of(name, **sliding, max_window_layers=2, layer_types=types))
            assert a.window == 8
            assert a.window_layers == (None if types[0] == types[1] else (1, 3))
            written = FAMILIES[name].write_config(a, "float32")
            assert CONFIG_MAPPING[name].from_dict(written).layer_types == types
            assert read(written) == a


def test_biases_on_every_linear():
    a = read(config_of("llama", attention_bias=True, mlp_bias=True))
    assert a.linear_bias
    assert read(FAMILIES["llama"].write_config(a, "float32")) == a


# ---------------------------------------------------------------------------------------------------------------------
# refusals


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "'original_max_position_embeddings' is missing",
        ),
        ("llama", {"rope_scaling": YARN | {"attention_factor": 1.2}}, "attention_factor of its own"),
        ("ernie4_5", {"rope_scaling": YARN}, "yarn on neighbouring dims"),
        ("glm", {"rope_scaling": YARN}, "yarn on neighbouring dims"),
        ("stablelm", {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "yarn on a part of each head"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ("llama3", {"rope_scaling": {**CONFIGS["llama3"]["rope_scaling"], "low_freq_factor": 2.0}}, "fixes them"),
        ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ("llama", {"mlp_bias": True}, "attention_bias and mlp_bias differ"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("mimo", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "some layers have"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "chunked_attention is not known"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is off"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "changes from layer to layer"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ("llama", {"quantization_config": {"bits": 4}}, "unknown method"),
        ("llama", {"hidden_act": "relu"}, "activation relu"),
        ("starcoder2", {"hidden_act": "silu"}, "activation silu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled by the layer's number"),
        ("gpt2", {"scale_attn_weights": False}, "not scaled"),
        ("gpt2", {"add_cross_attention": True}, "cross attention"),
        ("gemma", {"attention_bias": True}, "a bias on q, k, v and o without one in the MLP"),
        ("gemma", {"use_bidirectional_attention": True}, "causal"),
        ("nemotron", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
        ("nemotron", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope'"),
        ("granite", {"mlp_bias": True}, "attention_bias and mlp_bias differ"),
        ("granite", {"residual_multiplier": 0.0}, "a multiplier of 0"),
        ("granitemoe", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
        ("opt", {"do_layer_norm_before": False}, "norms come after attention and MLP"),
        ("opt", {"word_embed_proj_dim": 32}, "embeddings are projected"),
        ("opt", {"_remove_final_layer_norm": True}, "no norm after the last layer"),
        ("opt", {"layer_norm_elementwise_affine": False}, "norms have no weights"),
        ("gpt_neox", {"use_parallel_residual": True}, "read the same input"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias is off"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias is off"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha 1.5"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention is not known"),
        ("gpt_oss", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'"),
        (
            "gpt_oss",
            {"rope_scaling": {**CONFIGS["gpt_oss"]["rope_scaling"], "attention_factor": 1.2}},
            "attention_factor",
        ),
        ("mimo", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is off"),
        ("olmoe", {"clip_qkv": 8.0}, "are clipped"),
        ("olmoe", {"attention_bias": True}, "attention_bias"),
        ("olmoe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "always be 1"),
        ("ernie4_5_moe", {"use_bias": True}, "its router has no bias"),
        ("deepseek_v3", {"norm_topk_prob": False}, "always renormalises"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    ],
)
def test_refusals_name_the_reason(name, changes, message):
    with pytest.raises(UsageError, match=message) as error:
        read(config_of(name, **changes))
    assert error.value.where == "config.json"
    assert error.value.what.startswith(f"this {CONFIGS[name]['model_type']} model cannot be converted")


def test_a_value_that_is_none_of_the_known_ones():
    with pytest.raises(UsageError, match="hidden_act") as error:
        read(config_of("llama", hidden_act="xielu"))
    assert "xielu" in error.value.what
    with pytest.raises(CheckpointError, match="describes no model") as broken:
        read(config_of("llama", rms_norm_eps="small"))
    assert broken.value.where == "config.json: rms_norm_eps"


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(UsageError, match="unknown architecture") as error:
        family_of({"model_type": "acorn", "architectures": ["AcornForCausalLM"]})
    for name in DENSE:
        assert name in str(error.value.expected)
    assert "acorn" in str(error.value.found)
    assert family_of({"architectures": ["Qwen2ForCausalLM"]}).model_type == "qwen2"


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "ALiBi"), ("mpt", "ALiBi"), ("falcon", "parallel residual"), ("phi", "parallel residual"),
        ("cohere", "parallel residual"), ("gemma2", "soft-capped"), ("gemma3_text", "two bases"),
        ("olmo2", "over all heads at once"), ("glm4", "norms come after"), ("hunyuan_v1_dense", "after rope"),
        ("minimax", "lightning"), ("minimax_m2", "over all heads at once"), ("llama4", "chunked"), ("bert", "encoder"),
        ("mamba", "state-space"), ("t5", "a decoder"),
    ],
)  # fmt: skip
def test_what_megatron_core_cannot_express_is_refused_by_name_and_reason(model_type, reason):
    with pytest.raises(UsageError, match=reason) as error:
        family_of({"model_type": model_type, "architectures": ["AcornForCausalLM"]})
    assert error.value.what.startswith(f"this {model_type} model cannot be converted: ")
    assert error.value.where == "config.json"


def test_every_family_is_found_under_its_name():
    assert {name: family.model_type for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}


def test_no_family_is_refused():
    assert not REFUSED.keys() & FAMILIES.keys()


def test_gemmas_gelu_is_the_tanh_form():
    assert read(config_of("gemma", hidden_act="gelu")) == read(CONFIGS["gemma"])


BAICHUAN = {
    "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 8, "intermediate_size": 96, "max_position_embeddings": 4096, "vocab_size": 64000,
}  # fmt: skip


def test_both_baichuans():
    first, second = read(BAICHUAN), read({**BAICHUAN, "vocab_size": 125696})
    assert first.folded is None
    assert second.folded == Folded(normalised_head=True)
    assert read({**BAICHUAN, "z_loss_weight": 0}).folded == second.folded
    for a in (first, second, replace(second, vocab_size=120)):
        assert read(FAMILIES["baichuan"].write_config(a, "bfloat16")) == a
    for changes, reason in (
        ({"vocab_size": 125700}, "a vocabulary of 125700 tokens"),
        ({"num_attention_heads": 40, "hidden_size": 320}, "ALiBi"),
        ({"vocab_size": 125696, "tie_word_embeddings": True}, "a normalised head"),
    ):
        with pytest.raises(UsageError, match=reason):
            read({**BAICHUAN, **changes})
    with pytest.raises(UsageError, match="ALiBi"):
        read({key: value for key, value in BAICHUAN.items() if key != "max_position_embeddings"})


def test_granites_factors():
    """A factor of one, and a softmax scale of its default, are those of Llama."""
    plain = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
    a = read(config_of("granite", **plain, attention_multiplier=8**-0.5))
    assert (a.folded, a.softmax_scale, a.tied) == (None, None, True)
    a = read(config_of("granite", embedding_multiplier=1.0))
    assert a.folded == Folded(residual=0.22, logits_divisor=8.0)
    assert a.tied
    a = read(CONFIGS["granite"])
    assert a.folded == Folded(12.0, residual=0.22, logits_divisor=8.0, tied=True)
    assert not a.tied


# ---------------------------------------------------------------------------------------------------------------------
# tables


@pytest.mark.parametrize("name", NAMES)
def test_the_megatron_side_is_the_standard_one(name):
    """Families differ on their own side alone: a checkpoint is resharded without knowing where it came from."""
    a = read(CONFIGS[name])

    def megatron_side(rules):
        """By key; a family's rule may make several tensors of one."""
        keys = [key for rule in rules for key in (rule.megatron, *(key for key, _ in rule.derived))]
        assert len(set(keys)) == len(keys)
        return {
            key: (rule.target, rule.tp, rule.tied_copy)
            for rule in rules
            for key in (rule.megatron, *(key for key, _ in rule.derived))
        }

    rules = family_of(CONFIGS[name]).rules(a)
    assert megatron_side(rules) == megatron_side(standard(a))


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_tables_are_what_transformers_saves(name, tiny_model):
    a = replace(read(CONFIGS[name]), mtp_layers=0)  # transformers leaves multi-token prediction out
    layout = huggingface_layout(family_of(CONFIGS[name]).rules(a), axis_sizes(a))
    expected = {piece.key(ids)[1]: layout.shape(piece) for piece in layout.pieces for ids in piece.ids()}
    with (tiny_model(name) / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    assert {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"} == expected


# ---------------------------------------------------------------------------------------------------------------------
# Megatron-LM's args


def through_args(a: Architecture) -> Architecture:
    args = to_args(a, Mesh(tp=2), padded=128, divisible_by=64, dtype="bfloat16", fmt="torch", spec="te")
    return from_args(json.loads(json.dumps(args)))


VARIANTS = {
    **CONFIGS,
    "biases": config_of("llama", attention_bias=True, mlp_bias=True),
    "gelu": config_of("gpt2", activation_function="gelu"),
    "untied": config_of("gpt2", tie_word_embeddings=False),
    "sliding": config_of("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0),
    "sliding_mixed": config_of("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3),
    "sliding_dots": config_of("dots1", sliding_window=8, max_window_layers=2),
    "yarn": config_of("qwen2", rope_scaling=YARN),
    "gpt_oss_plain": config_of("gpt_oss", rope_scaling={"rope_type": "default"}, sliding_window=None),
    "gpt_oss_sliding": config_of("gpt_oss", layer_types=["sliding_attention"] * 4),
    "gpt_oss_default": {
        key: value for key, value in CONFIGS["gpt_oss"].items() if key not in ("rope_scaling", "layer_types")
    },
    "groups_of_one": config_of("deepseek_v3", topk_group=1),
    "groups_as_megatron": config_of("deepseek_v2", topk_group=4),
    "one_head": config_of("olmoe", num_attention_heads=1, num_key_value_heads=1),
    "odd_theta": config_of("llama", rope_theta=12345.5),
    "odd_factor": config_of("llama", rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "geglu": config_of("llama", hidden_act="gelu_pytorch_tanh"),
    "erf_geglu": config_of("llama", hidden_act="gelu"),
    "relu": config_of("gpt2", activation_function="relu"),
    "nemotron_biases": config_of("nemotron", attention_bias=True, mlp_bias=True),
    "granite_biases": config_of("granite", attention_bias=True, mlp_bias=True),
    "granite_untied": config_of("granite", tie_word_embeddings=False),
    "opt_gelu": config_of("opt", activation_function="gelu", enable_bias=False),
    "baichuan2": {**BAICHUAN, "vocab_size": 125696},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_args_say_the_same_model(name):
    a = read(VARIANTS[name])
    assert through_args(a) == a


def test_what_no_flag_of_megatron_lm_says():
    """The model converts; what its launch needs besides is said."""
    for name, words in (
        ("gemma", "bias_activation_fusion=True"), ("erf_geglu", "bias_activation_fusion=False"), ("opt", "functional.relu"),
        ("granite", "softmax_scale=0.0625"),
    ):  # fmt: skip
        (line,) = without_flag(read(VARIANTS[name]))
        assert words in line
        flags = " ".join(launch_flags(read(VARIANTS[name]), Mesh(), "bfloat16", divisible_by=128, fmt="torch"))
        assert ("--swiglu" in flags) == (name == "granite")
    for name in ("llama", "gpt2", "nemotron", "mixtral"):
        assert without_flag(read(CONFIGS[name])) == ()
    flags = launch_flags(read(CONFIGS["nemotron"]), Mesh(), "bfloat16", divisible_by=128, fmt="torch")
    assert {"--squared-relu", "--apply-layernorm-1p"} <= set(flags)
    flags = launch_flags(read(CONFIGS["opt"]), Mesh(), "bfloat16", divisible_by=128, fmt="torch")
    assert {"--max-position-embeddings 258", "--seq-length 256"} <= set(flags)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama", "llama"), ("llama3", "llama"), ("llama_linear", "llama"), ("llama_tied", "llama"),
        ("mistral", "mistral"), ("mistral_nemo", "llama"), ("qwen2", "qwen2"), ("qwen2_tied", "qwen2"),
        ("qwen3", "qwen3"), ("qwen3_tied", "qwen3"), ("gpt2", "gpt2"), ("biases", "llama"), ("gelu", "gpt2"),
        ("untied", "gpt2"), ("sliding", "qwen2"),
    ],
)  # fmt: skip
def test_a_family_that_can_express_it(name, family):
    """Without a name the first that can; a named one if it can."""
    a = replace(read(VARIANTS[name]), family="")
    found = infer_family(a)
    assert found.model_type == family
    back = found.read_config(found.write_config(replace(a, family=family), "float32"))
    assert describe_differences(replace(a, family=family), back, TRAINING_ONLY) == []
    named = VARIANTS[name]["model_type"]
    assert infer_family(a, named).model_type == named


def test_a_model_of_no_family():
    a = replace(read(CONFIGS["llama"]), norm="layer")
    with pytest.raises(UsageError, match="no Hugging Face architecture") as error:
        infer_family(a)
    assert "llama: kind of norm: layer and rms" in error.value.details
    with pytest.raises(UsageError, match="no Hugging Face architecture"):
        infer_family(replace(read(CONFIGS["qwen3"]), family=""), "llama")
    with pytest.raises(UsageError, match="unknown family 'bloom'"):
        infer_family(a, "bloom")


def test_what_a_config_would_lose():
    family, a = FAMILIES["llama"], read(CONFIGS["llama"])
    assert family.lost(replace(a, window=8), family.write_config(a, "float32")) == ["window: 8 and none"]
    assert family.lost(replace(a, attention_dropout=0.5), family.write_config(a, "float32")) == []
    (reason,) = family.lost(a, config_of("llama", mlp_bias=True))
    assert "differ" in reason
    with pytest.raises(UsageError, match="cannot express") as error:
        family.write_config(replace(a, qk_norm=True), "float32")
    assert error.value.details == ("norms of queries and keys: yes and no",)


def test_rope_kinds():
    for rope in (
        Rope(),
        Rope(5e5, scaling=RopeScaling("llama3", 32.0)),
        Rope(1e6, scaling=RopeScaling("linear", 4.0)),
    ):
        assert read_rope(write_rope(rope)) == rope
    assert write_rope(None) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, "do not say what model it is"),
        ({"window_size": (7, 3)}, "not causal"),
        ({"position_embedding_type": "relative"}, "position embedding is not converted"),
        ({"hf_folded": {"embeddings": 2.0}}, "damaged"),
    ],
)
def test_args_that_are_refused(changes, message):
    args = to_args(read(CONFIGS["llama"]), Mesh(), padded=128, divisible_by=1, dtype="float32", fmt="torch", spec="te")
    with pytest.raises(CheckpointError, match=message):
        from_args({**args, **changes})


def test_an_interval_of_full_attention_says_the_same_as_the_list():
    config = config_of("qwen3_next")
    types = config.pop("layer_types")
    assert read(config | {"full_attention_interval": 4}) == read(config | {"layer_types": types})
    assert read(config | {"layer_types": types}).linear_layers == (0, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# gpt-oss, and what megatron-core computes differently


def test_the_variants_survive_config_json():
    for name in (
        "gpt_oss_plain",
        "gpt_oss_sliding",
        "gpt_oss_default",
        "groups_of_one",
        "groups_as_megatron",
        "one_head",
    ):
        a = read(VARIANTS[name])
        assert read(FAMILIES[a.family].write_config(a, "bfloat16")) == a, name


def test_windows_on_some_layers():
    assert (read(CONFIGS["gpt_oss"]).window, read(CONFIGS["gpt_oss"]).window_layers) == (8, (0, 2))
    a = read(VARIANTS["gpt_oss_default"])
    assert (a.window, a.window_layers) == (8, (0, 2))
    assert (a.rope.scaling.factor, a.rope.scaling.original_max_positions, a.rope.scaling.truncate) == (
        32.0,
        4096,
        False,
    )
    assert (read(VARIANTS["gpt_oss_sliding"]).window, read(VARIANTS["gpt_oss_sliding"]).window_layers) == (8, None)
    assert read(VARIANTS["gpt_oss_plain"]).window is None


@pytest.mark.parametrize(
    ("frequency", "layers"),
    [(2, (0, 2)), (3, (0, 1, 3)), ("2", (0, 2)), ("([1,0]*2)", (0, 2)), ([1] * 4, None), (None, None)],
)
def test_every_way_to_say_which_layers_have_the_window(frequency, layers):
    """An integer N is a layer of full attention after N - 1 with the window (transformer/utils.py 0.16.1)."""
    a = read(CONFIGS["gpt_oss"])
    args = to_args(a, Mesh(), padded=128, divisible_by=1, dtype="float32", fmt="torch", spec="te")
    assert from_args({**args, "window_attn_skip_freq": frequency}).window_layers == layers


def test_the_arguments_of_a_run_say_yarn_too():
    """Some of Megatron-LM's arguments have other names than the config that is made of them (argument_utils.py)."""
    a = read(CONFIGS["gpt_oss"])
    args = to_args(a, Mesh(), padded=128, divisible_by=1, dtype="float32", fmt="torch", spec="te")
    assert args["position_embedding_type"] == "yarn"
    for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim"):
        del args[f"yarn_{name}"]
    assert from_args(args) == a


def test_the_flags_of_gpt_oss():
    flags = launch_flags(read(CONFIGS["gpt_oss"]), Mesh(2, etp=1), "bfloat16", divisible_by=128, fmt="torch_dist")
    assert {
        "--position-embedding-type yarn", "--rotary-scaling-factor 32.0", "--yarn-original-max-position-embeddings 64",
        "--no-yarn-correction-range-round-to-int", "--window-size 7,0", "--window-attn-skip-freq '[1, 0, 1, 0]'",
        "--softmax-type learnable", "--quick-geglu", "--glu-linear-offset 1.0", "--activation-func-clamp-value 7.0",
    } <= set(flags)  # fmt: skip
    assert not {"--swiglu", "--disable-bias-linear"} & set(flags)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("olmoe", "over all heads"), ("ernie4_5_moe", "softmax scores"), ("deepseek_v2", "best 1"),
        ("groups_of_one", "best 2, megatron-core by their best 4"), ("one_head", None), ("groups_as_megatron", None),
        ("deepseek_v3", None), ("gpt_oss", None), ("glm4_moe", None),
    ],
)  # fmt: skip
def test_what_megatron_core_computes_differently(name, reason):
    a = read(VARIANTS[name])
    found = inexact(a)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found
    args = to_args(a, Mesh(), padded=128, divisible_by=1, dtype="float32", fmt="torch", spec="te")
    assert args.get("hf_inexact") == found


def test_a_softmax_that_is_not_known():
    args = to_args(read(CONFIGS["llama"]), Mesh(), padded=128, divisible_by=1, dtype="float32", fmt="torch", spec="te")
    with pytest.raises(CheckpointError, match="this kind of softmax"):
        from_args({**args, "softmax_type": "off-by-one"})
