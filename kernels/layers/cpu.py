# SPDX-License-Identifier: Apache-2.0
"""Layers in C++ (cpu.cpp)."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, threads
from sglang_diffxkv.kernels.cpu.function import CFunction

_rms_norm = CFunction("layers", "diffxkv_rms_norm")
_rotary = CFunction("layers", "diffxkv_rotary")
_silu_and_mul = CFunction("layers", "diffxkv_silu_and_mul")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm of x [..., D], or of the sum with ``residual``, which then becomes that sum.

    Args:
        x, residual, weight [D]: contiguous, fp32, bf16 or fp16, all of one dtype.

    Returns:
        Of x's shape and dtype.
    """
    out, dim = torch.empty_like(x), x.shape[-1]
    _rms_norm(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // dim,
        dim,
        eps,
        DTYPE_CODES[x.dtype],
        threads(),
    )
    return out


def rotary(
    positions: torch.Tensor, x: torch.Tensor, dim: int, cache: torch.Tensor, neox: bool
) -> None:
    """Rotate heads x [T, H * D] in place at the first of their elements.

    Args:
        positions: int64 [T], contiguous. x: fp32, bf16 or fp16; tokens may be strided.
        dim: D.
        cache: [positions, R], as many elements of a head are rotated: cosines before sines; of
            x's dtype, contiguous.
        neox: whether pairs are the halves of those elements, not neighbours.
    """
    tokens, width = x.shape
    _rotary(
        x.data_ptr(),
        x.stride(0),
        tokens,
        width // dim,
        dim,
        cache.shape[1],
        positions.data_ptr(),
        cache.data_ptr(),
        neox,
        DTYPE_CODES[x.dtype],
        threads(),
    )


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(a) * b`` of contiguous x = [a, b], [T, 2 D] -> [T, D]; fp32, bf16 or fp16."""
    rows, dim = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, dim)
    dtype = DTYPE_CODES[x.dtype]
    _silu_and_mul(x.data_ptr(), out.data_ptr(), rows, dim, dtype, threads())
    return out
