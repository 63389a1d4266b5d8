"""What a family is: a table of equations, a config table, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from shardtool.errors import UsageError
from shardtool.families.architecture import Architecture, Rope, RopeScaling
from shardtool.layout.rules import Rule

Config = Mapping[str, Any]


TRAINING_ONLY = frozenset({"attention_dropout", "hidden_dropout"})  # they do not change what the model computes


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an Architecture and its key in config.json.

    `default` is what transformers takes where the key is absent. `read` and `write` change the value where the two differ.
    """

    name: str
    key: str
    default: Any
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True, slots=True)
class Family:
    """One Hugging Face architecture.

    `fixed` are the switches of an Architecture that this family always has. `derived` computes the fields that
    depend on several keys; `extra` adds the keys that config.json needs besides the table. `refuse` returns the reason
    why a config cannot be converted, or None. `ignored` are patterns of buffers in old files that carry no weights.
    `prefix` is the part of every tensor name that some files leave out. `caveats` says where Megatron cannot compute
    exactly the same.
    """

    model_type: str
    architecture: str
    table: tuple[Field, ...]
    rules: Callable[[Architecture], tuple[Rule, ...]]
    fixed: Config
    derived: Callable[[Config, dict[str, Any]], dict[str, Any]]
    extra: Callable[[Architecture], dict[str, Any]]
    refuse: Callable[[Config], str | None]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    caveats: Callable[[Architecture], tuple[str, ...]] = lambda _: ()

    def read_config(self, config: Config) -> Architecture:
        """The architecture of a config.json; UsageError with the reason where Megatron or this family cannot hold it."""
        reason = self.refuse(config) or _refuse_quantised(config)
        if reason:
            raise UsageError(f"this {self.model_type} model cannot be converted: {reason}", where="config.json")
        values: dict[str, Any] = {}
        for item in self.table:
            value = config.get(item.key, item.default)
            try:
                values[item.name] = item.read(item.default if value is None else value)
            except (TypeError, ValueError, KeyError) as error:
                raise UsageError(
                    f"config.json: {item.key} cannot be read", found=repr(value), where=str(error)
                ) from error
        values.update(self.fixed)
        values.update(self.derived(config, values))
        a = Architecture(family=self.model_type, **values)
        if reason := _refuse_activation(a):
            raise UsageError(f"this {self.model_type} model cannot be converted: {reason}", where="config.json")
        return a

    def write_config(self, a: Architecture, dtype: str) -> dict[str, Any]:
        """The config.json of an architecture; UsageError naming the fields where the family cannot express it."""
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        config.update({item.key: item.write(getattr(a, item.name)) for item in self.table})
        config.update(self.extra(a))
        config["torch_dtype"] = dtype
        if differences := self.lost(a, config):
            raise UsageError(f"a {self.model_type} config.json cannot express this model", details=tuple(differences))
        return config

    def lost(self, a: Architecture, config: Config) -> list[str]:
        """The fields of an architecture that do not survive config.json."""
        try:
            back = self.read_config(config)
        except UsageError as error:
            return [error.what]
        return describe_differences(replace(a, family=self.model_type), back, TRAINING_ONLY)


def describe_differences(a: Architecture, b: Architecture, ignore: frozenset[str] = frozenset()) -> list[str]:
    """One line per field in which two architectures differ."""
    ours, theirs = asdict(a), asdict(b)
    names = [item.name for item in fields(Architecture) if item.name not in ignore]
    return [f"{name}: {ours[name]} and {theirs[name]}" for name in names if ours[name] != theirs[name]]


def _refuse_activation(a: Architecture) -> str | None:
    """Megatron-LM has flags for SwiGLU and for GELU (arguments.py 0.16); its args could not say anything else."""
    known = ("silu",) if a.gated else ("gelu", "gelu_tanh")
    if a.activation not in known:
        return f"its MLP has the activation {a.activation}; Megatron-LM has {' and '.join(known)} there"
    return None


def _refuse_quantised(config: Config) -> str | None:
    if quantised := config.get("quantization_config"):
        return f"its weights are quantised ({quantised.get('quant_method', 'unknown method')}); dequantise them first"
    return None


def read_rope(config: Config, *, theta: float = 10000.0, latent: bool = False, fraction: float | None = None) -> Rope:
    """The rotary embedding of a config.json, in either dialect: rope_theta + rope_scaling, or rope_parameters.

    `theta` is what the configuration class takes where none is given; `latent` attention knows yarn;
    `fraction` is the default share of each head that is rotated, for families where it may be less than all. Raises ValueError for a kind that megatron-core's GPTModel cannot express (0.16.1: rope_scaling=True fixes
    llama3's constants to 1, 4 and 8192; only the factor is a parameter).
    """
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    part = float(scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or fraction or 1.0))
    if part != 1.0 and fraction is None:
        raise ValueError(f"partial_rotary_factor {part}: this family's attention rotates whole heads")
    if kind == "default":
        return Rope(theta, part)
    if kind == "linear":
        return Rope(theta, part, scaling=RopeScaling("linear", float(scaling["factor"])))
    if kind == "llama3":
        constants = tuple(
            float(scaling[key]) for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        if constants != (1.0, 4.0, 8192.0):
            raise ValueError(
                f"llama3 rope scaling with constants {constants}: megatron-core fixes them to (1, 4, 8192)"
            )
        return Rope(theta, scaling=RopeScaling("llama3", float(scaling["factor"])))
    if kind == "yarn" and latent:
        return Rope(theta, scaling=_read_yarn(scaling))
    raise ValueError(f"rope type {kind!r}: megatron-core's GPTModel has default, linear and llama3")


def _read_yarn(scaling: Config) -> RopeScaling:
    if scaling.get("attention_factor") is not None:
        raise ValueError("yarn with an attention_factor of its own: megatron-core computes it")
    mscale_all = float(scaling.get("mscale_all_dim") or 0.0)
    return RopeScaling(
        "yarn",
        float(scaling["factor"]),
        original_max_positions=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        mscale=float(scaling.get("mscale") or 1.0),
        mscale_all_dim=mscale_all,
        truncate=bool(scaling.get("truncate", True)),
    )


def write_rope(rope: Rope | None) -> dict[str, Any]:
    """The keys of config.json for a rotary embedding, in the dialect that transformers 4 and 5 both read."""
    if rope is None:
        return {}
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        keys["partial_rotary_factor"] = rope.fraction
    if rope.scaling is None:
        return keys | {"rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling.kind, "factor": rope.scaling.factor}
    if rope.scaling.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_max_positions,
        }
    if rope.scaling.kind == "yarn":
        names = {"original_max_position_embeddings": "original_max_positions"}
        names |= {name: name for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}
        scaling |= {key: getattr(rope.scaling, name) for key, name in names.items()}
    return keys | {"rope_scaling": scaling}


def rope_refusal(config: Config, *, latent: bool = False, partial: bool = False) -> str | None:
    """Why the rotary embedding of a config.json cannot be converted, or None."""
    try:
        read_rope(config, latent=latent, fraction=1.0 if partial else None)
    except (ValueError, KeyError, TypeError) as error:
        return f"incomplete rope scaling, {error} is missing" if isinstance(error, KeyError) else str(error)
    return None
