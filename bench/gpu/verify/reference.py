# SPDX-License-Identifier: Apache-2.0
"""Float64 attention over the dequantised tokens, on whatever device the pages are.

The readable references are the ``naive.py`` beside each kernel; these are the same sums for inputs
that would take those minutes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from bench.gpu.inputs import Layers
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, head_counts
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pack import TokenRows
from sglang_diffxkv.kernels.pages import SealedTables
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support import torch_pack

LOG2_E = math.log2(math.e)


class Tokens(NamedTuple):
    """Keys and values, float64 [H, T, D], and which of them there are, bool [H, T]."""

    k: torch.Tensor
    v: torch.Tensor
    kept: torch.Tensor


def sealed_tokens(tables: SealedTables, pages: torch.Tensor, raw_dtype: torch.dtype) -> Tokens:
    """What the listed pages hold, dequantised by vectorised torch."""
    arena, _, heads, layout = tables
    n, h, dim = len(pages), layout.num_kv_heads, layout.head_dim
    k, v = arena.new_zeros((2, n * h * PAGE_TOKENS, dim), dtype=torch.float32)
    first = torch.arange(0, n * h * PAGE_TOKENS, PAGE_TOKENS, device=arena.device).view(n, h)
    torch_pack.unpack_into(tables, pages, TokenRows(k, v, first), raw_dtype)
    n_high, n_low = head_counts(heads[pages.long()])
    kept = torch.arange(PAGE_TOKENS, device=arena.device) < (n_high + n_low)[..., None]

    def by_head(x: torch.Tensor, width: int) -> torch.Tensor:
        by_page = x.view(n, h, PAGE_TOKENS, width)
        return by_page.transpose(0, 1).reshape(h, n * PAGE_TOKENS, width)

    return Tokens(by_head(k, dim).double(), by_head(v, dim).double(), by_head(kept, 1)[..., 0])


def attend(q: torch.Tensor, tokens: Tokens, softmax: Softmax) -> AttentionState:
    """Queries [T, Hq, D] over all ``kept`` tokens, without a causal mask."""
    count, q_heads, dim = q.shape
    kv_heads = len(tokens.k)
    grouped = q.double().view(count, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
    scores = grouped @ tokens.k.mT * softmax.scale
    scores = scores.masked_fill(~tokens.kept[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None].nan_to_num(neginf=0)).exp()
    out = weights @ tokens.v

    def by_query(x: torch.Tensor) -> torch.Tensor:
        return x.view(kv_heads, count, q_heads // kv_heads, -1).transpose(0, 1)

    return AttentionState(
        by_query(out).reshape(count, q_heads, dim),
        by_query(lse[..., None] * LOG2_E).reshape(count, q_heads),
    )


class Queries(NamedTuple):
    """Of a decode step [B, Hq, D]: over open pages, and over sealed ones.

    Attributes:
        key_mean: fp32 [H, D] that sealed keys lack, where results come back from their basis.
    """

    q: torch.Tensor
    q_sealed: torch.Tensor
    softmax: Softmax
    key_mean: torch.Tensor | None = None


def decode_layer(layers: Layers, layer: int, queries: Queries) -> AttentionState:
    """Every sequence's query over its open and its sealed pages."""
    q, q_sealed, softmax, key_mean = queries
    outs, lses = [], []
    for b in range(len(q)):
        parts = []
        mine = slice(int(layers.sealed_indptr[b]), int(layers.sealed_indptr[b + 1]))
        pages = layers.sealed_pages[mine]
        sealed = sealed_tokens(layers.tables(layer), pages, layers.k_raw.dtype)
        found = attend(q_sealed[b : b + 1], sealed, softmax)
        if key_mean is not None:
            found = from_sealed(found, q[b : b + 1], key_mean, softmax)
        parts.append(found)
        if layers.sequences.raw_slot is not None:
            parts.append(attend(q[b : b + 1], _open_tokens(layers, layer, b), softmax))
        whole = merge64(parts)
        outs.append(whole.out)
        lses.append(whole.lse)
    return AttentionState(torch.cat(outs), torch.cat(lses))


def merge64(parts: list[AttentionState]) -> AttentionState:
    """Attention over disjoint sets of tokens, in float64; any of them may be empty."""
    lse = torch.stack([p.lse for p in parts]).double() / LOG2_E
    total = lse.logsumexp(0)
    weights = (lse - total.nan_to_num(neginf=0)).exp()
    out = (torch.stack([p.out for p in parts]).double() * weights[..., None]).sum(0)
    return AttentionState(out, total * LOG2_E)


def _open_tokens(layers: Layers, layer: int, b: int) -> Tokens:
    sequences = layers.sequences
    first, count = int(sequences.first[b]), int(sequences.count[b])
    assert sequences.raw_slot is not None
    slots = sequences.raw_slot[sequences.pages[first : first + count].long()]
    slots = slots[slots >= 0].long()
    length = (len(slots) - 1) * PAGE_TOKENS + int(sequences.last_len[b])
    k, v = (
        raw[layer, slots].flatten(0, 1)[:length].transpose(0, 1).double()
        for raw in (layers.k_raw, layers.v_raw)
    )
    return Tokens(k, v, torch.ones(k.shape[:2], dtype=torch.bool, device=k.device))
