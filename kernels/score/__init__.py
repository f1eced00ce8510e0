# SPDX-License-Identifier: Apache-2.0
"""Importance: the attention that tokens of open pages receive from sampled queries."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.score import cpu

__all__ = ["score_decode", "score_open"]


def score_open(
    q: torch.Tensor,
    lse: torch.Tensor,
    q_indptr: torch.Tensor,
    q_position: torch.Tensor,
    k_raw: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
    page_position: torch.Tensor,
    accum: torch.Tensor,
    sm_scale: float,
) -> None:
    """Add to ``accum`` what each token of the listed open pages receives.

    A token's score for a KV head is the maximum over the GQA group of the sum, over its sequence's
    sampled queries at later positions, of exp(q.k * sm_scale) / 2 ** lse (DiffKV, 2412.03131). Its
    own query does not count. Tokens not yet written lie after every query and stay untouched.
    Where sequences share a page, a GPU adds their scores in any order.

    Args:
        q: [S, Hq, D], the sampled queries of all sequences, fp32, bf16 or fp16.
        lse: fp32 [S, Hq], base-2 LSE of each query's full attention (open and sealed).
        q_indptr: int32 [B + 1], where each sequence's queries start.
        q_position: int32 [S], position of each query in its sequence.
        k_raw: [R, 64, H, D], one layer's raw keys; slots may be strided, the rest is contiguous.
        indptr: int32 [B + 1], where each sequence's open pages start in ``slots``.
        slots: int32 [N], raw pages; one may appear in several sequences.
        page_position: int32 [N], index of each page in its sequence: token j of it has position
            ``64 * page_position + j``.
        accum: fp32 [R, H, 64], added to in place; slots may be strided.
        sm_scale: factor of q.k.

    Raises:
        ValueError: shapes or strides do not fit.
    """
    slots_count, tokens, kv_heads, dim = k_raw.shape
    if q.shape[2] != dim or q.shape[1] % kv_heads or tokens != PAGE_TOKENS:
        raise ValueError(f"q {tuple(q.shape)} against raw pages {tuple(k_raw.shape)}")
    if k_raw.stride()[1:] != (kv_heads * dim, dim, 1) or accum.stride()[1:] != (PAGE_TOKENS, 1):
        raise ValueError(f"strides of raw pages {k_raw.stride()} or of accum {accum.stride()}")
    if accum.shape != (slots_count, kv_heads, PAGE_TOKENS) or not lse.is_contiguous():
        raise ValueError(f"accum {tuple(accum.shape)}, lse strides {lse.stride()}")
    _implementation(q)(
        q, lse, q_indptr, q_position, k_raw, indptr, slots, page_position, accum, sm_scale
    )


def _implementation(q: torch.Tensor) -> Callable[..., None]:
    if on_gpu(q):
        from sglang_diffxkv.kernels.score import triton  # CPU machines may lack it

        return triton.score_open
    return cpu.kernel().score_open


def score_decode(
    q: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    k_raw: torch.Tensor,
    table: torch.Tensor,
    raw_slot: torch.Tensor,
    accum: torch.Tensor,
    sm_scale: float,
) -> None:
    """`score_open` for one query per sequence, its last token, without lists of open pages.

    What tokens receive is in units of uniform attention: a query that sees n tokens gives each
    n times its probability. For CUDA graphs: what is launched depends on the shapes alone. On GPUs
    only.

    Args:
        q, lse, k_raw, accum, sm_scale: as for `score_open`, with one query per sequence [B, Hq, D];
            queries may be strided.
        seq_lens: int32 or int64 [B], tokens of each sequence, its query's included.
        table: int32 [B, P], the page at each index of a sequence; read up to its length only.
        raw_slot: int32 [V], raw page of each open page, negative for all others.
    """
    from sglang_diffxkv.kernels.score import triton  # CPU machines may lack it

    triton.score_decode(q, lse, seq_lens, k_raw, table, raw_slot, accum, sm_scale)
