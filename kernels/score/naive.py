# SPDX-License-Identifier: Apache-2.0
"""Readable reference in float64: one sequence, page, token and query head at a time."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.score import RawTables, ScoringQueries
from sglang_diffxkv.kernels.softmax import Softmax, capped
from sglang_diffxkv.kernels.step import StepPages


def score_open(
    queries: ScoringQueries, opened: OpenPages, accum: torch.Tensor, softmax: Softmax
) -> None:
    """See `score.score_open`."""
    q, keys = queries.q, opened.keys
    kv_heads = keys.shape[2]
    group = q.shape[1] // kv_heads
    weights_lse = queries.lse.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    for b in range(len(opened.indptr) - 1):
        asking = range(int(queries.indptr[b]), int(queries.indptr[b + 1]))
        for entry in range(int(opened.indptr[b]), int(opened.indptr[b + 1])):
            slot, start = int(opened.slots[entry]), int(opened.position[entry]) * PAGE_TOKENS
            for h in range(kv_heads):
                for t in range(PAGE_TOKENS):
                    later = [s for s in asking if int(queries.position[s]) > start + t]
                    if not later:
                        continue
                    heads = slice(h * group, (h + 1) * group)
                    products = q[later, heads].double() @ keys[slot, t, h].double()
                    scores = capped(products * softmax.scale, softmax.cap)
                    received = torch.exp(scores - weights_lse[later, heads]).sum(0)
                    accum[slot, h, t] += received.max().to(accum.dtype)


def score_decode(
    q: torch.Tensor, lse: torch.Tensor, pages: StepPages, raw: RawTables, softmax: Softmax
) -> None:
    """See `score.score_decode`."""
    queries = pages.queries
    q, lse = q[::queries], lse[::queries]
    for b, length in enumerate((pages.lengths - (queries - 1)).tolist()):
        slots = raw.raw_slot[pages.table[b, : pages.count[b]].long()]
        position = (slots >= 0).nonzero().flatten()
        whole = torch.tensor([0, 1]), torch.tensor([length - 1])
        of_uniform = lse[b : b + 1] - torch.tensor(max(length, 1)).log2()
        indptr = torch.tensor([0, len(position)])
        score_open(
            ScoringQueries(q[b : b + 1], of_uniform, *whole),
            OpenPages(raw.keys, raw.keys, indptr, slots[position], position),
            raw.accum,
            softmax,
        )
