# SPDX-License-Identifier: Apache-2.0
"""Importance: the attention that tokens of open pages receive from sampled queries."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.dispatch import operation
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages

__all__ = ["RawTables", "ScoringQueries", "score_decode", "score_open"]


class ScoringQueries(NamedTuple):
    """Some queries of B sequences, ragged.

    Attributes:
        q: [S, Hq, D], fp32, bf16 or fp16.
        lse: fp32 [S, Hq], base-2 LSE of each query's full attention (open and sealed).
        indptr: int32 [B + 1], into ``q``.
        position: int32 [S], of each query in its sequence.
    """

    q: torch.Tensor
    lse: torch.Tensor
    indptr: torch.Tensor
    position: torch.Tensor


class RawTables(NamedTuple):
    """One layer's raw keys, and what their tokens have received.

    Attributes:
        keys: [R, 64, H, D]; slots may be strided, the rest is contiguous.
        raw_slot: int32 [V], raw page of each open page, negative for all others.
        accum: fp32 [R, H, 64], added to in place; slots may be strided.
    """

    keys: torch.Tensor
    raw_slot: torch.Tensor
    accum: torch.Tensor


@operation
def score_open(
    queries: ScoringQueries, opened: OpenPages, accum: torch.Tensor, softmax: Softmax
) -> None:
    """Add to ``accum`` what each token of the listed open pages receives.

    A token's score for a KV head is the maximum over the GQA group of the sum, over its sequence's
    sampled queries at later positions, of exp(score) / 2 ** lse (DiffKV, 2412.03131). Its
    own query does not count. Tokens not yet written lie after every query and stay untouched.
    Where sequences share a page, a GPU adds their scores in any order.

    Args:
        opened: a page may appear in several sequences; values are not looked at.
        accum: fp32 [R, H, 64], added to in place; slots may be strided.
        softmax: of the layer, which has no window: pages that are not to be sealed need no scores.

    Raises:
        ValueError: shapes or strides do not fit.
    """
    q, keys = queries.q, opened.keys
    slots, tokens, kv_heads, dim = keys.shape
    if q.shape[2] != dim or q.shape[1] % kv_heads or tokens != PAGE_TOKENS:
        raise ValueError(f"q {tuple(q.shape)} against raw pages {tuple(keys.shape)}")
    if keys.stride()[1:] != (kv_heads * dim, dim, 1) or accum.stride()[1:] != (PAGE_TOKENS, 1):
        raise ValueError(f"strides of raw pages {keys.stride()} or of accum {accum.stride()}")
    if accum.shape != (slots, kv_heads, PAGE_TOKENS) or not queries.lse.is_contiguous():
        raise ValueError(f"accum {tuple(accum.shape)}, lse strides {queries.lse.stride()}")
    score_open.on(q)(queries, opened, accum, softmax)


@operation
def score_decode(
    q: torch.Tensor, lse: torch.Tensor, pages: StepPages, raw: RawTables, softmax: Softmax
) -> None:
    """`score_open` for one query per sequence, without lists of open pages.

    It is that of the sequence's first new token: of N, those behind it may be rejected drafts.

    What tokens receive is in units of uniform attention: a query that sees n tokens gives each
    n times its probability. For CUDA graphs: what is launched depends on the shapes alone. On GPUs
    only.

    Args:
        q: [B * N, Hq, D]; queries may be strided.
        lse: fp32 [B * N, Hq], as in `ScoringQueries`.
        pages: the step's; those that are not open are passed over.
        raw: ``accum`` is written.
        softmax: of the layer.
    """
    score_decode.on(q)(q, lse, pages, raw, softmax)
