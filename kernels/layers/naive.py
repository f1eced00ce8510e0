# SPDX-License-Identifier: Apache-2.0
"""Readable references in float64."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """See `layers.rms_norm`; it leaves residual."""
    total = x.double() if residual is None else x.double() + residual.double()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total * scale * weight.double()


def rotary(
    positions: torch.Tensor, x: torch.Tensor, dim: int, cache: torch.Tensor, neox: bool
) -> torch.Tensor:
    """See `layers.rotary`; x is left as it is."""
    half = cache.shape[1] // 2
    cos, sin = cache[positions].double()[:, None].split(half, -1)
    out = x.double().unflatten(1, (-1, dim))
    turned = out[..., : 2 * half].clone()
    a, b = (
        (turned[..., :half], turned[..., half:]) if neox else (turned[..., ::2], turned[..., 1::2])
    )
    first, second = a * cos - b * sin, b * cos + a * sin
    joined = (first, second)
    out[..., : 2 * half] = torch.cat(joined, -1) if neox else torch.stack(joined, -1).flatten(-2)
    return out.flatten(1)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See `layers.silu_and_mul`."""
    gate, up = x.double().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up
