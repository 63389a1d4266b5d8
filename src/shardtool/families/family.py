"""What a family is: a table of equations, a config table, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from shardtool.errors import ShardtoolError, UsageError, heads_and_groups, in_words, no_model
from shardtool.families.architecture import Architecture
from shardtool.families.dialects import Dialect, as_stored, check_dialect, in_dialect
from shardtool.layout.rules import Rule

Config = Mapping[str, Any]


# quant_method of quantization_config: what reading dequantises (checkpoint.quantised)
DEQUANTISED = ("fp8", "mxfp4")
TRAINING_ONLY = frozenset({"attention_dropout", "hidden_dropout"})  # they do not change what the model computes


# what to do with a model that no config.json says
RESHARD = "`shardtool reshard` changes its layout without one"


def cannot_be_converted(model_type: object, reason: str) -> UsageError:
    """A model that megatron-core, or this tool, cannot hold."""
    return UsageError(
        f"this {model_type} model cannot be converted: {reason}", where="config.json",
        hint="docs/families.md says what is converted; another framework may load this model as it is",
    )  # fmt: skip


class Field(Struct, frozen=True):
    """One field of an Architecture and its key in config.json.

    `default` is what transformers takes where the key is absent. `read` and `write` change the value where the two differ.
    """

    name: str
    key: str
    default: Any
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


class Family(Struct, frozen=True):
    """One Hugging Face architecture.

    `fixed` are the switches of an Architecture that this family always has. `derived` computes the fields that
    depend on several keys; `extra` adds the keys that config.json needs besides the table. `refuse` returns the reason
    why a config cannot be converted, or None. `ignored` are patterns of buffers in old files that carry no weights.
    `prefix` is the part of every tensor name that some files leave out; `mtp_prefix` what the names of multi-token-prediction
    layers begin with (`{n}` stands for the number of layers). `caveats` says where Megatron cannot compute
    exactly the same. `not_in_megatron` returns the reason why megatron-core cannot hold a model that the table can
    (translation does not ask it). `own_rope` families have code of their own for rope, outside transformers, which
    knows no scaling but what the table reads. `limit` says what changes beyond `max_positions`, or None. `dialects`, the
    table's own first, are other names of its tensors on disk.
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
    mtp_prefix: str = "model.layers.{n}."
    caveats: Callable[[Architecture], tuple[str, ...]] = lambda _: ()
    not_in_megatron: Callable[[Config], str | None] = lambda _: None
    own_rope: bool = False
    limit: Callable[[Config], str | None] = lambda _: None
    dialects: tuple[Dialect, ...] = ()

    def speaking(self, dialect: str | None) -> Family:
        """The family with its table in a dialect (None: its own); UsageError where it has none of that name."""
        check_dialect(self.dialects, dialect, self.model_type)
        return replace(self, rules=lambda a: in_dialect(self.rules(a), self.dialects, dialect))

    def rules_as_stored(self, a: Architecture, present: Collection[str]) -> tuple[Rule, ...]:
        """The rules in the spelling that the names on disk have."""
        return as_stored(self.rules(a), self.dialects, present, a.num_layers)

    def read_config(self, config: Config, *, megatron: bool = True) -> Architecture:
        """The architecture of a config.json; UsageError with the reason where Megatron or this family cannot hold it.

        Without `megatron` only the family is asked.
        """
        reason = self.refuse(config) or _refuse_quantised(config)
        if megatron:
            reason = reason or self.not_in_megatron(config)
        if reason:
            raise cannot_be_converted(self.model_type, reason)
        values: dict[str, Any] = {}
        for item in self.table:
            value = config.get(item.key, item.default)
            try:
                values[item.name] = item.read(item.default if value is None else value)
                if type(item.default) is int and not (type(values[item.name]) is int and values[item.name] >= 0):
                    raise no_model(f"config.json: {item.key}", "a size", repr(value)[:80])
            except KeyError as error:
                raise cannot_be_converted(self.model_type, f"{item.key} {value!r:.80} is not known") from error
            except (TypeError, ValueError) as error:
                raise no_model(
                    f"config.json: {item.key}", f"a value such as {item.default!r}", repr(value)[:80]
                ) from error
        values.update(self.fixed)
        try:
            values.update(self.derived(config, values))
        except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
            raise no_model("config.json", "sizes that fit each other", in_words(error)) from error
        heads, groups = values["num_heads"], values["num_query_groups"]
        if type(groups) is not int or groups < 1 or heads % groups:
            raise heads_and_groups(heads, repr(groups)[:80], "config.json: num_key_value_heads")
        a = Architecture(family=self.model_type, **values)
        if megatron and a.out_bias and not a.linear_bias:
            a = replace(a, out_bias=False, zero_out_bias=True)  # the tensors decide whether Megatron can be it
        if megatron and (reason := _refuse_activation(a)):
            raise cannot_be_converted(self.model_type, reason)
        return a

    def write_config(self, a: Architecture, dtype: str) -> dict[str, Any]:
        """The config.json of an architecture; UsageError naming the fields where the family cannot express it."""
        config = self.config(a, dtype)
        if differences := self.lost(a, config):
            raise UsageError(
                f"a {self.model_type} config.json cannot express this model", details=tuple(differences), hint=RESHARD
            )
        return config

    def config(self, a: Architecture, dtype: str) -> dict[str, Any]:
        """The config.json of an architecture as far as the family can say it; nothing is compared."""
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        config.update({item.key: item.write(getattr(a, item.name)) for item in self.table})
        config.update(self.extra(a))
        config["torch_dtype"] = dtype
        # Megatron does not know special tokens, and the class's own defaults would be wrong ones
        return config | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))

    def lost(self, a: Architecture, config: Config) -> list[str]:
        """The fields of an architecture that do not survive config.json."""
        try:
            back = self.read_config(config)
        except ShardtoolError as error:
            return [error.what]
        return describe_differences(replace(a, family=self.model_type), back, TRAINING_ONLY)


WORDS = {
    "num_layers": "layers", "num_heads": "attention heads", "num_query_groups": "query groups", "ffn_size": "size of the MLP",
    "norm": "kind of norm", "norm_eps": "epsilon of the norms", "gated": "gated MLP", "tied": "tied embeddings",
    "qkv_bias": "biases of q, k and v", "out_bias": "bias of the output projection", "linear_bias": "biases of all linears",
    "vocab_size": "vocabulary", "max_positions": "positions", "qk_norm": "norms of queries and keys",
    "qk_norm_whole": "norms of queries and keys over all heads at once",
}  # fmt: skip


def field_words(name: str) -> str:
    """A field of an Architecture as people call it."""
    return WORDS.get(name, name.replace("_", " "))


def value_words(value: object) -> str:
    """A value of such a field."""
    if value is None:
        return "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def describe_differences(a: Architecture, b: Architecture, ignore: frozenset[str] = frozenset()) -> list[str]:
    """One line per field in which two architectures differ.

    The size of a dense MLP counts only where there is one. How norms are stored is no difference of the model, and
    neither is which rows of an equally long table of positions are spare.
    """
    ignore |= {"centred_norms"}
    if a.max_positions + a.spare_positions == b.max_positions + b.spare_positions:
        ignore |= {"max_positions", "spare_positions"}
    if a.moe and b.moe and len(a.moe_layers) == a.num_layers and len(b.moe_layers) == b.num_layers:
        ignore |= {"ffn_size"}
    ours, theirs = to_builtins(a), to_builtins(b)
    lines: list[str] = []
    for name in (name for name in Architecture.__struct_fields__ if name not in ignore):
        left, right = ours[name], theirs[name]
        if isinstance(left, dict) and isinstance(right, dict):
            lines += [
                f"{field_words(name)}, {field_words(key)}: {value_words(left[key])} and {value_words(right[key])}"
                for key in left
                if left[key] != right[key]
            ]
        elif isinstance(left, dict) or isinstance(right, dict):
            given = ["none" if value is None else "given" for value in (left, right)]
            lines.append(f"{field_words(name)}: {given[0]} and {given[1]}")
        elif left != right:
            lines.append(f"{field_words(name)}: {value_words(left)} and {value_words(right)}")
    return lines


def _refuse_activation(a: Architecture) -> str | None:
    """What the args of a Megatron checkpoint can say (families.megatron_args)."""
    known = ("silu", "gelu", "gelu_tanh", "quick_gelu") if a.gated else ("gelu", "gelu_tanh", "relu", "relu2")
    if a.activation not in known:
        return f"its MLP has the activation {a.activation}; Megatron's args can say {', '.join(known)} there"
    return None


def _refuse_quantised(config: Config) -> str | None:
    quantised = config.get("quantization_config")
    if not quantised or quantised.get("quant_method") in DEQUANTISED:
        return None
    method = quantised.get("quant_method", "unknown method")
    return (
        f"its weights are quantised ({method}); {' and '.join(DEQUANTISED)} are dequantised on reading, others are not"
    )
