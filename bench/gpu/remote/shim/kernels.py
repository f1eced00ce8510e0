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

from sglang_diffxkv.kernels.gpu.launch import launch

HEADS, COLUMNS = 8, 1024
"""Of a program: of rope, and of the activation."""


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
    out = x.new_empty(x.shape)
    _rmsnorm(x, x, weight, out, eps, ADD=False)
    return out


def fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *_: Any
) -> None:
    """``residual += x``, then ``x = rmsnorm(residual)``, both in place, [T, D]."""
    _rmsnorm(x, residual, weight, x, eps, ADD=True)


def _rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    *,
    ADD: bool,
) -> None:
    rows, size = x.shape
    assert x.stride(1) == 1 and (residual.is_contiguous() or not ADD)
    launch(
        _rmsnorm_kernel, (rows,), x=x, residual=residual, weight=weight, out=out,
        row_stride=x.stride(0), SIZE=size, eps=eps, ADD=ADD, BLOCK=triton.next_power_of_2(size),
        num_warps=8,
    )  # fmt: skip


def silu_and_mul(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu of the first half of x [..., 2 D], times the second: out [..., D]."""
    size = x.shape[-1] // 2
    if out is None:
        out = x.new_empty(*x.shape[:-1], size)
    assert x.is_contiguous() and out.is_contiguous()
    grid = (x.numel() // (2 * size), triton.cdiv(size, COLUMNS))
    launch(_silu_and_mul_kernel, grid, x=x, out=out, SIZE=size, BLOCK=COLUMNS, num_warps=4)
    return out


def apply_rope_with_cos_sin_cache_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
    fused_args: Any = None,
) -> None:
    """Rotate q [T, H, D] and k [T, KH, D] in place; with ``fused_args`` also store k and its value.

    Args:
        cos_sin_cache: [positions, D] fp32, cosines then sines.
    """
    assert is_neox and q.shape[-1] == k.shape[-1] == cos_sin_cache.shape[-1]
    for x in (q, k):
        tokens, heads, dim = x.shape
        launch(
            _rope_kernel, (tokens, triton.cdiv(heads, HEADS)), x=x, cos_sin=cos_sin_cache,
            positions=positions, heads=heads, token_stride=x.stride(0), head_stride=x.stride(1),
            HALF=dim // 2, HEADS=HEADS, num_warps=4,
        )  # fmt: skip
    if fused_args is not None:
        rows = (x.reshape(len(k), -1) for x in (k, fused_args.value))
        caches = (x.view(len(x), -1) for x in (fused_args.k_buffer, fused_args.v_buffer))
        store_cache(*rows, *caches, fused_args.cache_loc)


def can_use_store_cache(k_row_bytes: int, v_row_bytes: int = 0, num_threads: int = 0) -> bool:
    """Keys and values of equal size only."""
    return v_row_bytes in (0, k_row_bytes)


def store_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    indices: torch.Tensor,
    **_: Any,
) -> None:
    """Write rows k and v [T, D] to rows ``indices`` of the caches [slots, D]."""
    tokens, size = k.shape
    assert v.shape == k.shape and k_cache.is_contiguous() and v_cache.is_contiguous()
    launch(
        _store_kernel, (tokens,), k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=indices,
        k_stride=k.stride(0), v_stride=v.stride(0), SIZE=size, BLOCK=triton.next_power_of_2(size),
        num_warps=4,
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
