# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels that score open pages. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import score
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.gpu.views import HeadShape, QueryView
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.score import RawTables, ScoringQueries
from sglang_diffxkv.kernels.score.triton_kernels import (
    PageTable,
    RawKeys,
    Scores,
    decode_kernel,
    open_kernel,
)
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages

DECODE_PAGES = 128
"""Entries of a page table that one program of `score_decode` looks through."""


@score.score_open.register("gpu")
def score_open(
    queries: ScoringQueries, opened: OpenPages, accum: torch.Tensor, softmax: Softmax
) -> None:
    q, lse, indptr, position = queries
    launch(
        open_kernel,
        (len(opened.slots), opened.keys.shape[2]),
        queries=QueryView.of(q, softmax, indptr, position),
        lse=lse,
        keys=RawKeys(opened.keys, opened.keys.stride(0)),
        opened=opened.lists,
        sequences=len(opened.indptr) - 1,
        scores=Scores(accum, accum.stride(0)),
        SHAPE=_shape(q, opened.keys),
        num_warps=4,
        maxnreg=255,
    )


@score.score_decode.register("gpu")
def score_decode(
    q: torch.Tensor, lse: torch.Tensor, pages: StepPages, raw: RawTables, softmax: Softmax
) -> None:
    keys, raw_slot, accum = raw
    width = pages.table.shape[1]
    launch(
        decode_kernel,
        (len(pages.count), triton.cdiv(width, DECODE_PAGES), keys.shape[2]),
        queries=QueryView.of(q, softmax),
        lse=lse,
        pages=PageTable(pages.table, width, pages.lengths, raw_slot),
        keys=RawKeys(keys, keys.stride(0)),
        scores=Scores(accum, accum.stride(0)),
        SHAPE=_shape(q, keys, pages.queries),
        PAGES=DECODE_PAGES,
        num_warps=4 if q.shape[2] <= 128 else 8,  # a page's keys are in registers
    )


def _shape(q: torch.Tensor, keys: torch.Tensor, queries: int = 1) -> HeadShape:
    kv_heads, dim = keys.shape[2:]
    return HeadShape(kv_heads, q.shape[1] // kv_heads, dim, queries)
