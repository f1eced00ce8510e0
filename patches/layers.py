# SPDX-License-Identifier: Apache-2.0
"""Hook: with our backend on a CPU, small layers of the model run as one compiled kernel each.

SGLang lets platforms of other packages register their own forward of a layer, by its exact class
(``BaseFusedOp.register_oot_forward``). What a kernel lacks goes to SGLang's plain implementation,
which it equals to rounding otherwise. Like SGLang's own kernels for GPUs, ours add to the residual,
and rotate queries and keys, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.platforms import current_platform

from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES
from sglang_diffxkv.kernels.layers import rms_norm, rotary, silu_and_mul

_FLAGS = ("variance_size_override", "override_orig_dtype", "cast_x_before_out_mul", "fp32_residual")


def install() -> None:
    """Register the kernels; on other platforms nothing."""
    if not current_platform.is_out_of_tree():
        return
    forwards: dict[type, Callable[..., Any]] = {RMSNorm: _rms_norm, SiluAndMul: _silu_and_mul}
    forwards |= dict.fromkeys(_plain_rotaries(RotaryEmbedding), _rotary)
    key = current_platform.get_dispatch_key_name()
    for layer, forward in forwards.items():
        BaseFusedOp.register_oot_forward(layer, forward, key)


def _plain_rotaries(base: type[RotaryEmbedding]) -> Iterator[type[RotaryEmbedding]]:
    """The class and those derived from it that differ in their tables only."""
    if base.forward_native is RotaryEmbedding.forward_native:
        yield base
    for derived in base.__subclasses__():
        yield from _plain_rotaries(derived)


def _fits(dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    """Whether the kernels take these as they are."""
    return dtype in DTYPE_CODES and all(t.dtype == dtype and t.is_contiguous() for t in tensors)


def _rms_norm(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: Any = None,  # which plain implementations do not look at
) -> Any:
    attributes, weight = self.__dict__, self.weight
    plain = post_residual_addition is None and not any(attributes.get(x) for x in _FLAGS)
    if not plain or not _fits(x.dtype, x, weight, *(() if residual is None else (residual,))):
        return self.forward_native(x, residual, post_residual_addition)
    out = rms_norm(x, weight, attributes["variance_epsilon"], residual)
    return out if residual is None else (out, residual)


def _silu_and_mul(self: Any, x: torch.Tensor) -> torch.Tensor:
    if x.dim() != 2 or not _fits(x.dtype, x):
        return self.forward_native(x)
    return silu_and_mul(x)


def _rotary(
    self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    cache, heads = self.cos_sin_cache, (query, key)
    asked = [*args, *kwargs.values()]
    plain = all(value is None for value in asked) and "sin_cos_cache" not in self.__dict__
    plain = plain and positions.dtype == torch.int64 and positions.dim() == 1
    plain = plain and all(x.dim() == 2 and x.stride(1) == 1 for x in heads)
    plain = plain and all(x.dtype == cache.dtype for x in heads)
    if not plain or not _fits(cache.dtype, cache) or not positions.is_contiguous():
        return self.forward_native(positions, query, key, *args, **kwargs)
    for x in heads:
        rotary(positions, x, self.head_size, cache, self.is_neox_style)
    return query, key
