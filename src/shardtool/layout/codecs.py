"""Codecs: how the elements that a tensor stores stand for the values of its components.

A piece of a layout may have one. *Decoding* gives the values that both sides of a plan mean, *encoding* what is stored.
Between two pieces with the same codec nothing is computed: the bytes are copied. Everything else is computed in fp32
and rounded once, to the dtype of the target (`execute.codecs`).
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct


class Affine(Struct, frozen=True):
    """value = stored * scale + shift; stored = (value - shift) / scale.

    `inverse` exchanges the two, so that a stored tensor can be a product: stored = value * scale + shift. With
    `rounded` the scale is first rounded to the dtype of the Megatron tensor, as models do that keep it as a scalar tensor
    of the dtype in which they run.
    """

    scale: float = 1.0
    shift: float = 0.0
    inverse: bool = False
    rounded: bool = False


class NormalisedRows(Struct, frozen=True):
    """value = stored / (the L2 norm of its row), in the stored dtype; stored = value, whose rows have the norm 1.

    The scale of the rows is lost: what is written back is the normalised tensor, which stands for the same values.
    """


class Centred(Struct, frozen=True):
    """value = stored - (the mean of its row, or of its column); stored = value, whose means are 0.

    What a LayerNorm reads may be shifted by a constant: with every contribution centred, RMSNorm computes the same.
    """

    columns: bool = False


Codec: TypeAlias = Affine | NormalisedRows | Centred

CENTRED = Affine(shift=1.0)  # norms stored as gamma - 1


def describe(codec: Codec | None) -> str:
    """A codec in words, for people and for the plan's digest."""
    if codec is None:
        return "stored as it is"
    if isinstance(codec, NormalisedRows):
        return "rows normalised"
    if isinstance(codec, Centred):
        return f"value = stored - the mean of its {'column' if codec.columns else 'row'}"
    product = f"{'value' if codec.inverse else 'stored'} * {codec.scale!r} + {codec.shift!r}"
    rounded = ", the factor rounded to the dtype" if codec.rounded else ""
    return f"{'stored' if codec.inverse else 'value'} = {product}{rounded}"
