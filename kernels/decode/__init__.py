# SPDX-License-Identifier: Apache-2.0
"""Decode attention: one query token per sequence, over sealed and over open pages.

Both functions return an attention state (`kernels.merge`). On a GPU they run Triton
kernels (``triton.py``, which does both kinds of pages in one launch for those who plan a step with
``plan.py``), on a CPU compiled C++ (``cpu.cpp``; ``layer.cpp`` does all of a layer of a decode
step in one call), without a compiler vectorised torch (``torch_ops.py``); ``naive.py`` is the
reference.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_diffxkv.kernels.decode import cpu, torch_ops
from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.merge import AttentionState

__all__ = ["decode_open", "decode_sealed"]


def decode_sealed(
    q: torch.Tensor,
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    indptr: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    sm_scale: float,
) -> AttentionState:
    """Attention of every sequence's query over its sealed pages, both tiers in one call.

    Args:
        q: [B, Hq, D], fp32, bf16 or fp16: the model's dtype, which raw tiers store. Rotated, where
            the sealed keys are.
        arena: uint8 [F, frame_bytes], contiguous.
        frames: int32 [V, max_frames], this layer's frame table; rows contiguous.
        heads: int32 [V, H, 2], this layer's records (payload offset, n_high | n_low << 8); pages
            contiguous.
        indptr: int32 [B + 1], where each sequence's pages start in ``pages``.
        pages: int32 [N], sealed page ids, in any order.
        layout: the layout that the pages were packed with.
        sm_scale: factor of q.k.

    Raises:
        ValueError: shapes do not fit the layout, or Hq is not a multiple of H.
    """
    kv_heads, dim = layout.num_kv_heads, layout.head_dim
    if q.shape[2] != dim or q.shape[1] % kv_heads or heads.shape[1] != kv_heads:
        raise ValueError(f"q {tuple(q.shape)} and heads {tuple(heads.shape)} against {layout}")
    if arena.shape[1] != layout.frame_bytes or not arena.is_contiguous():
        raise ValueError(f"arena {tuple(arena.shape)} against frames of {layout.frame_bytes} bytes")
    return _implementation(q).decode_sealed(
        q, arena, frames, heads, indptr, pages, layout, sm_scale
    )


def decode_open(
    q: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
    last_len: torch.Tensor,
    sm_scale: float,
) -> AttentionState:
    """Attention of every sequence's query over its open pages.

    Args:
        q: [B, Hq, D], fp32, bf16 or fp16.
        k_raw, v_raw: [R, 64, H, D], one layer's raw pages; slots may be strided, the rest is
            contiguous.
        indptr: int32 [B + 1], where each sequence's pages start in ``slots``; may be empty ranges.
        slots: int32 [N], raw page of each open page, full but for each sequence's last.
        last_len: int32 [B], valid tokens (1..64) of each sequence's last page.
        sm_scale: factor of q.k.

    Raises:
        ValueError: shapes or strides do not fit.
    """
    _, tokens, kv_heads, dim = k_raw.shape
    inner = (kv_heads * dim, dim, 1)
    if q.shape[2] != dim or q.shape[1] % kv_heads or k_raw.shape != v_raw.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k_raw.shape)}, v {tuple(v_raw.shape)}")
    if k_raw.stride()[1:] != inner or k_raw.stride() != v_raw.stride() or tokens != PAGE_TOKENS:
        raise ValueError(f"raw pages {tuple(k_raw.shape)} with strides {k_raw.stride()}")
    return _implementation(q).decode_open(q, k_raw, v_raw, indptr, slots, last_len, sm_scale)


def _implementation(q: torch.Tensor) -> Any:
    if on_gpu(q):
        from sglang_diffxkv.kernels.decode import triton  # not installed everywhere

        return triton
    return cpu.kernels() or torch_ops
