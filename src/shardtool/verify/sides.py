"""The two sides of a comparison. Plain data: which directory, and for Megatron what the caller says is in it."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from shardtool.families.architecture import Architecture
from shardtool.layout.mesh import Mesh, virtual_stages


class HuggingFaceSide(Struct, frozen=True):
    """A Hugging Face model directory; its own config.json says what transformers builds."""

    path: Path

    @property
    def label(self) -> str:
        """How the report names this side."""
        return f"transformers, {self.path}"


class MegatronSide(Struct, frozen=True):
    """A Megatron checkpoint (root or iteration directory), and the model that megatron-core is asked to build for it.

    `architecture` should come from the checkpoint's own args: then a wrong epsilon or rope base in the args shows.
    `mesh` is the layout of a legacy `torch` checkpoint; a `torch_dist` checkpoint loads at any.
    """

    path: Path
    architecture: Architecture
    mesh: Mesh

    @property
    def label(self) -> str:
        """How the report names this side."""
        sizes = f"tp {self.mesh.tp} pp {self.mesh.pp}"
        if (vpp := virtual_stages(self.mesh)) > 1:
            sizes += f" vpp {vpp}"
        return f"megatron-core {sizes}, {self.path}"


Side = HuggingFaceSide | MegatronSide
