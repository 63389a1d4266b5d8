"""What megatron-core needs changed to run on a CPU without Transformer Engine. Only verify's workers do this.

megatron-core is written for CUDA: as shipped, 0.16.1 builds a model on a CPU but cannot run it. Each shim says which
versions need it; where a version does not, or no longer has the name, the shim changes nothing that matters. They
touch devices, random numbers and bookkeeping, never the arithmetic: dropout is off and the masks are the same masks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.remote_device import _remote_device


def apply() -> None:
    """Change torch and megatron-core in this process. Harmless when called twice."""
    _eager()
    _current_device()
    _masks()
    _random_tracker()
    _router_gemm()
    _latent_attention()
    _gated_delta_net()
    _lone_rank()


def _module(name: str) -> ModuleType | None:
    """megatron.core.`name`, or None where this version has no such module or cannot import it."""
    try:
        return importlib.import_module(f"megatron.core.{name}")
    except ImportError:
        return None


def _replace(module: ModuleType | None, name: str, value: object) -> None:
    """Set a name of a module that has it already."""
    if module is not None and hasattr(module, name):
        setattr(module, name, value)


def _eager() -> None:
    # All versions: small functions are decorated with torch.compile where they are imported (megatron/core/jit.py),
    # which imports a compiler in each worker and runs it for a few calls. This comes before any of them is imported.
    def plain(function: Any = None, **_options: Any) -> Any:
        return plain if function is None else function

    _replace(torch, "compile", plain)


def _current_device() -> None:
    # 0.16 to 0.19: rope, the router, the expert bias and the attention's scratch buffer are put on
    # torch.cuda.current_device(), which raises on a torch built without CUDA.
    _replace(torch.cuda, "current_device", lambda: torch.device("cpu"))


def _masks() -> None:
    # 0.16 to 0.19: both masks are made with device="cuda". They are imported by name, hence both modules.
    for name in ("transformer.utils", "fusions.fused_softmax"):
        module = _module(name)
        _replace(module, "get_default_causal_mask", _causal_mask)
        _replace(module, "get_sliding_window_causal_mask", _sliding_window_mask)


def _causal_mask(sq: int) -> torch.Tensor:
    """True where position i (row) must not see position j: j > i."""
    return torch.ones(sq, sq, dtype=torch.bool).triu(diagonal=1)


def _sliding_window_mask(sq: int, skv: int, window_size: tuple[int, int]) -> torch.Tensor:
    """True where position i must not see position j: outside [i - left, i + right], aligned at the last positions."""
    visible = torch.ones(sq, skv, dtype=torch.bool).triu(diagonal=skv - sq - window_size[0])
    return ~visible.tril(diagonal=skv - sq + window_size[1])


class _NoTracker:
    """A random number tracker that tracks nothing: without dropout nothing is drawn in a forward pass."""

    def is_initialized(self) -> bool:
        return True

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:  # noqa: ARG002 (megatron-core passes it)
        yield


def _random_tracker() -> None:
    # All versions: DotProductAttention forks the CUDA generator around its dropout, which is not set up without CUDA.
    # The tracker object is replaced, not the getter, because many modules import the getter by name.
    module = _module("tensor_parallel.random")
    _replace(module, "_CUDA_RNG_STATE_TRACKER", _NoTracker())
    _replace(module, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)


def _router_gemm() -> None:
    # 0.16.0 and 0.16.1: without Transformer Engine moe_utils never defines te_general_gemm, and every MoE forward dies
    # with a NameError; later versions set it to None themselves.
    module = _module("transformer.moe.moe_utils")
    if module is not None and not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None  # type: ignore[attr-defined]


def _latent_attention() -> None:
    # 0.16 to 0.19: MLA passes k_channels and v_channels to its core attention, which the local one does not take; and
    # 0.16 believes that Transformer Engine is there and tests isinstance(x, None).
    if importlib.util.find_spec("transformer_engine") is None:
        _replace(_module("transformer.multi_latent_attention"), "HAVE_TE", False)
    backends, attention = _module("models.backends"), _module("transformer.dot_product_attention")
    if backends is None or attention is None or hasattr(backends, "_shardtool_attention"):
        return
    plain: Any = attention.DotProductAttention

    class LatentDotProductAttention(plain):  # type: ignore[misc]
        """The local attention, its output as wide as the values when they differ from the keys."""

        def __init__(
            self,
            config: Any,
            *args: Any,
            k_channels: int | None = None,  # noqa: ARG002 (follows from the query)
            v_channels: int | None = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(config, *args, **kwargs)
            if v_channels is not None:
                self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    backends._shardtool_attention = plain  # type: ignore[attr-defined]
    _replace(backends, "DotProductAttention", LatentDotProductAttention)


def _gated_delta_net() -> None:
    # 0.16 to 0.19: the module refuses to be built without flash-linear-attention, of which its deterministic mode uses
    # the L2 norm alone.
    module = _module("ssm.gated_delta_net")
    if module is not None and not getattr(module, "HAVE_FLA", True):
        module.HAVE_FLA = True  # type: ignore[attr-defined]
        module.l2norm = _l2norm  # type: ignore[attr-defined]


def _l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """x over its L2 norm, as flash-linear-attention 0.4 has it (fla/modules/l2norm.py): the eps is inside the root."""
    return x * torch.rsqrt(x.float().square().sum(dim, keepdim=True) + eps).to(x.dtype)


def _lone_rank() -> None:
    # 0.16 to 0.19: to load, megatron-core describes the shards of other ranks as those of rank (rank + 1) % world_size.
    # For a pipeline stage in a world of one (tp 1) that is the rank itself, and torch finds its shards missing. There
    # the shards of others get a place without a rank. The description is thrown away after these checks.
    strategy = _module("dist_checkpointing.strategies.torch")
    name = "sharded_tensor_to_torch_sharded_tensor"
    describe: Any = getattr(strategy, name, None)
    if describe is None or hasattr(describe, "__wrapped__"):
        return
    elsewhere = _remote_device("cpu")

    @functools.wraps(describe)
    def describe_alone(sh_tens: list[Any], *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size() > 1:
            return describe(sh_tens, *args, **kwargs)
        mine = {tuple(sh_ten.global_offset) for sh_ten in sh_tens}

        def metadata(offset: tuple[int, ...], size: Any, placement: Any) -> ShardMetadata:
            return ShardMetadata(list(offset), size, placement if tuple(offset) in mine else elsewhere)

        try:
            _replace(strategy, "ShardMetadata", metadata)
            return describe(sh_tens, *args, **kwargs)
        finally:
            _replace(strategy, "ShardMetadata", ShardMetadata)

    _replace(strategy, name, describe_alone)
