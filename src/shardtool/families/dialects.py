"""On-disk dialects: other names and shapes that files of a family have for the same tensors.

transformers 5 keeps the experts of a layer in two tensors and converts names on loading and saving
(conversion_mapping.py 5.24). `save_pretrained` writes what was loaded, and the modules' own names with
`save_original_format=False`; some models are published so. A family's table is its first dialect; the others are rows in
the place of the table's.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec import Struct
from msgspec.structs import replace

from shardtool.errors import UsageError
from shardtool.layout.equation import parse
from shardtool.layout.rules import Rule


class Dialect(Struct, frozen=True):
    """`rows`: the first name of a row of the family's table (its ending), the name here, and the equation here."""

    name: str
    rows: tuple[tuple[str, str, str], ...] = ()

    def spelled(self, rule: Rule) -> Rule:
        """A rule of the table as this dialect has it: the same Megatron tensor."""
        for own, name, equation in self.rows:
            if rule.hf[0].endswith(own):
                prefix = rule.hf[0].removesuffix(own)
                return replace(rule, hf=(prefix + name,), equation=parse(equation), codecs=rule.codecs[:1])
        return rule


# fmt: off
GATE_UP = "e (x + x) h -> e (x + x) h"
DOWN    = "e h x -> e h x"
FUSED_ROWS = (
    ("mlp.experts.{e}.gate_proj.weight",         "mlp.experts.gate_up_proj", GATE_UP),
    ("mlp.experts.{e}.down_proj.weight",         "mlp.experts.down_proj",    DOWN),
)
PER_EXPERT = Dialect("per-expert")
QWEN = (PER_EXPERT, Dialect("fused", FUSED_ROWS))  # and DeepSeek, GLM, dots1, OLMoE
MIXTRAL = (PER_EXPERT, Dialect("fused", (
    ("block_sparse_moe.gate.weight",             "mlp.gate.weight",          "e h -> e h"),
    ("block_sparse_moe.experts.{e}.w1.weight",   "mlp.experts.gate_up_proj", GATE_UP),
    ("block_sparse_moe.experts.{e}.w2.weight",   "mlp.experts.down_proj",    DOWN),
)))
ERNIE = (PER_EXPERT, Dialect("fused", (
    *FUSED_ROWS,
    ("mlp.moe_statics.e_score_correction_bias",  "mlp.gate.moe_statics.e_score_correction_bias", "1 e -> e"),
)))
GRANITE = (Dialect("original"), Dialect("fused", (  # fused in either
    ("block_sparse_moe.router.layer.weight",     "block_sparse_moe.router.weight",        "e h -> e h"),
    ("block_sparse_moe.input_linear.weight",     "block_sparse_moe.experts.gate_up_proj", GATE_UP),
    ("block_sparse_moe.output_linear.weight",    "block_sparse_moe.experts.down_proj",    DOWN),
)))
GPT_NEOX = (Dialect("original"), Dialect("lm_head", (("embed_out.weight", "lm_head.weight", "v h -> v h"),)))
# fmt: on


def check_dialect(dialects: tuple[Dialect, ...], wanted: str | None, family: str) -> None:
    """UsageError where a dialect is asked for that the family has not."""
    if wanted is not None and wanted not in [dialect.name for dialect in dialects]:
        raise UsageError(
            f"--dialect {wanted!r}: {family} has no such names on disk",
            expected=" or ".join(dialect.name for dialect in dialects) or "no --dialect: it has one set of names",
            found=wanted,
            hint="leave --dialect out for the names that the family is published with",
        )


def in_dialect(rules: tuple[Rule, ...], dialects: tuple[Dialect, ...], wanted: str | None) -> tuple[Rule, ...]:
    """The rules of a table in the dialect of that name (None: its own)."""
    found = next((dialect for dialect in dialects if dialect.name == wanted), None)
    return rules if found is None else tuple(map(found.spelled, rules))


def as_stored(
    rules: tuple[Rule, ...], dialects: tuple[Dialect, ...], present: Collection[str], num_layers: int
) -> tuple[Rule, ...]:
    """The rules of a table, each in the first dialect whose names are among those present (in none: the table's own).

    Every rule is decided by itself: a file may have the fused experts in its layers and others behind them. What is then
    present and no rule's is for the accounting to refuse.
    """

    def there(rule: Rule) -> bool:
        layers = rule.ids(num_layers) if rule.per_layer else (0,)
        return any(name.format(l=layer, e=0, m=rule.mtp_start) in present for name in rule.hf for layer in layers)

    return tuple(next((d.spelled(rule) for d in dialects if there(d.spelled(rule))), rule) for rule in rules)


def found_in(rules: tuple[Rule, ...], stored: tuple[Rule, ...], dialects: tuple[Dialect, ...]) -> list[str]:
    """The names of the dialects in which tensors are stored that the dialects spell differently."""
    found: dict[str, None] = {}
    for own, there in zip(rules, stored, strict=True):
        spellings = {dialect.name: dialect.spelled(own).hf for dialect in dialects}
        if len(set(spellings.values())) > 1:
            found |= dict.fromkeys(name for name, names in spellings.items() if names == there.hf)
    return list(found)


def same_components(a: tuple[Rule, ...], b: tuple[Rule, ...]) -> bool:
    """Whether two tables are one but for names and shapes on disk."""

    def told(rule: Rule) -> tuple[object, ...]:
        return rule.megatron, rule.target, rule.equation.order, rule.layers, rule.codecs[:1], rule.constants[:1]

    return list(map(told, a)) == list(map(told, b))
