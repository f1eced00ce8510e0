# SPDX-License-Identifier: Apache-2.0
"""Decode attention: one query token per sequence, over sealed and over open pages.

Both operations return an attention state (`kernels.merge`). On a GPU they run Triton kernels
(``triton.py``, which does both kinds of pages in one launch for those who divide a step's work with
``work.py``), on a CPU compiled C++ (``cpu.cpp``; ``layer.cpp`` does all of a layer of a decode step
in one call); ``naive.py`` is the reference. What they return is of a part of the tokens: without
sinks. A step that verifies drafts has several queries per sequence: ``triton.attend`` and
``layer.py`` take them, and sinks.
"""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.dispatch import operation
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import OpenPages, SealedPages
from sglang_diffxkv.kernels.softmax import Softmax

__all__ = ["decode_open", "decode_sealed"]


@operation
def decode_sealed(q: torch.Tensor, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    """Attention of every sequence's query over its sealed pages, both tiers in one call.

    Args:
        q: [B, Hq, D], fp32, bf16 or fp16: the model's dtype, which raw tiers store. Rotated, where
            the sealed keys are.
        softmax: of the layer.

    Raises:
        ValueError: shapes do not fit the layout, or Hq is not a multiple of H.
    """
    arena, heads, layout = sealed.arena, sealed.heads, sealed.layout
    kv_heads, dim = layout.num_kv_heads, layout.head_dim
    if q.shape[2] != dim or q.shape[1] % kv_heads or heads.shape[1] != kv_heads:
        raise ValueError(f"q {tuple(q.shape)} and heads {tuple(heads.shape)} against {layout}")
    if arena.shape[1] != layout.frame_bytes or not arena.is_contiguous():
        raise ValueError(f"arena {tuple(arena.shape)} against frames of {layout.frame_bytes} bytes")
    return decode_sealed.on(q)(q, sealed, softmax)


@operation
def decode_open(
    q: torch.Tensor, opened: OpenPages, last_len: torch.Tensor, softmax: Softmax
) -> AttentionState:
    """Attention of every sequence's query over its open pages.

    Args:
        q: [B, Hq, D], fp32, bf16 or fp16.
        opened: full, but for each sequence's last page; with a window they follow each other.
        last_len: int32 [B], valid tokens (1..64) of each sequence's last page.
        softmax: of the layer.

    Raises:
        ValueError: shapes or strides do not fit.
    """
    keys, values = opened.keys, opened.values
    _, tokens, kv_heads, dim = keys.shape
    inner = (kv_heads * dim, dim, 1)
    if q.shape[2] != dim or q.shape[1] % kv_heads or keys.shape != values.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(keys.shape)}, v {tuple(values.shape)}")
    if keys.stride()[1:] != inner or keys.stride() != values.stride() or tokens != PAGE_TOKENS:
        raise ValueError(f"raw pages {tuple(keys.shape)} with strides {keys.stride()}")
    return decode_open.on(q)(q, opened, last_len, softmax)
