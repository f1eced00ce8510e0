# SPDX-License-Identifier: Apache-2.0
"""The few kernels of SGLang that a dense Llama needs, in Triton; for the bench only.

Its own are in a wheel that other versions of torch cannot load, or compiled while it starts. Names
and arguments are those that SGLang calls.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

HEADS = 8
"""Of a program of rope."""


@triton.jit
def _rmsnorm_kernel(x, residual, weight, out, row_stride, SIZE, eps, ADD: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    value = tl.load(x + row * row_stride + column, inside, 0.0).to(tl.float32)
    if ADD:
        at = residual + row * SIZE + column
        value += tl.load(at, inside, 0.0).to(tl.float32)
        tl.store(at, value, inside)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / SIZE + eps)
    scaled = value * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * (row_stride if ADD else SIZE) + column, scaled, inside)


@triton.jit
def _silu_and_mul_kernel(x, out, SIZE, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(x + row * 2 * SIZE + column, inside, 0.0).to(tl.float32)
    value = tl.load(x + (row * 2 + 1) * SIZE + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, gate * tl.sigmoid(gate) * value, inside)


@triton.jit
def _rope_kernel(x, cos_sin, positions, heads, token_stride, head_stride, HALF: tl.constexpr,
                 HEADS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    row = cos_sin + tl.load(positions + token).to(tl.int64) * 2 * HALF
    cos, sin = tl.load(row + column)[None, :], tl.load(row + HALF + column)[None, :]
    at = x + token * token_stride + head[:, None] * head_stride + column[None, :]
    inside = (head < heads)[:, None]
    first = tl.load(at, inside, 0.0).to(tl.float32)
    second = tl.load(at + HALF, inside, 0.0).to(tl.float32)
    tl.store(at, first * cos - second * sin, inside)
    tl.store(at + HALF, second * cos + first * sin, inside)


@triton.jit
def _store_kernel(k, v, k_cache, v_cache, slots, k_stride, v_stride, SIZE, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    column = tl.arange(0, BLOCK)
    # Slot 0 takes what graphs are padded with; nobody reads it.
    inside = (column < SIZE) & (slot > 0)
    tl.store(k_cache + slot * SIZE + column, tl.load(k + token * k_stride + column, inside), inside)
    tl.store(v_cache + slot * SIZE + column, tl.load(v + token * v_stride + column, inside), inside)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *_: Any) -> torch.Tensor:
    """x [T, D] scaled to unit root mean square, times weight [D]."""
    rows, size = x.shape
    out = x.new_empty(rows, size)
    _rmsnorm_kernel[(rows,)](
        x, x, weight, out, x.stride(0), size, eps, ADD=False, BLOCK=triton.next_power_of_2(size),
        num_warps=8,
    )  # fmt: skip
    return out


def fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *_: Any
) -> None:
    """``residual += x``, then ``x = rmsnorm(residual)``, both in place, [T, D]."""
    rows, size = x.shape
    assert residual.is_contiguous()
    _rmsnorm_kernel[(rows,)](
        x, residual, weight, x, x.stride(0), size, eps, ADD=True,
        BLOCK=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip


def silu_and_mul(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu of the first half of x [..., 2 D], times the second: out [..., D]."""
    size = x.shape[-1] // 2
    if out is None:
        out = x.new_empty(*x.shape[:-1], size)
    assert x.is_contiguous() and out.is_contiguous()
    rows, block = x.numel() // (2 * size), 1024
    _silu_and_mul_kernel[(rows, triton.cdiv(size, block))](x, out, size, BLOCK=block, num_warps=4)
    return out


def apply_rope_with_cos_sin_cache_inplace(
    q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor, *,
    is_neox: bool, rope_dim: int = 0, fused_args: Any = None,
) -> None:  # fmt: skip
    """Rotate q [T, H, D] and k [T, KH, D] in place; with ``fused_args`` also write k and its value.

    Args:
        cos_sin_cache: [positions, D] fp32, cosines then sines.
    """
    assert is_neox and q.shape[-1] == k.shape[-1] == cos_sin_cache.shape[-1]
    for x in (q, k):
        tokens, heads, dim = x.shape
        _rope_kernel[(tokens, triton.cdiv(heads, HEADS))](
            x, cos_sin_cache, positions, heads, x.stride(0), x.stride(1), HALF=dim // 2,
            HEADS=HEADS, num_warps=4,
        )  # fmt: skip
    if fused_args is not None:
        x = fused_args
        rows = (
            part.reshape(len(k), -1)
            for part in (
                k,
                x.value,
            )
        )
        caches = (part.view(len(part), -1) for part in (x.k_buffer, x.v_buffer))
        store_cache(*rows, *caches, x.cache_loc)


def can_use_store_cache(k_row_bytes: int, v_row_bytes: int = 0, num_threads: int = 0) -> bool:
    """Keys and values of equal size only."""
    return v_row_bytes in (0, k_row_bytes)


def store_cache(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    indices: torch.Tensor, **_: Any,
) -> None:  # fmt: skip
    """Write rows k and v [T, D] to rows ``indices`` of the caches [slots, D]."""
    tokens, size = k.shape
    assert v.shape == k.shape and k_cache.is_contiguous() and v_cache.is_contiguous()
    _store_kernel[(tokens,)](
        k, v, k_cache, v_cache, indices, k.stride(0), v.stride(0), size,
        BLOCK=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip


def clamp_position_cuda(seq_lens: torch.Tensor) -> torch.Tensor:
    """Positions of the last tokens."""
    return (seq_lens - 1).clamp_(min=0)


def is_arch_support_pdl() -> bool:
    """No kernel here is launched before its predecessor ends."""
    return False


def weak_ref_tensor(x: torch.Tensor) -> torch.Tensor:
    """A strong one: outputs of graphs stay allocated."""
    return x
