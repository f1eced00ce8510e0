# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels that score open pages. Nothing here waits for the device."""

from __future__ import annotations

import math

import torch
import triton

from sglang_diffxkv.kernels import score
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.score import SampledQueries
from sglang_diffxkv.kernels.score.triton_kernels import decode_kernel, open_kernel
from sglang_diffxkv.kernels.step import StepPages

LOG2_E = math.log2(math.e)
DECODE_PAGES = 128
"""Entries of a page table that one program of `score_decode` looks through."""


def _precision(dtype: torch.dtype) -> str:
    """Input precision of products: TF32 holds 16-bit models' elements exactly."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@score.score_open.register("gpu")
def score_open(
    queries: SampledQueries,
    lse: torch.Tensor,
    opened: OpenPages,
    accum: torch.Tensor,
    sm_scale: float,
) -> None:
    q, k_raw = queries.q, opened.keys
    kv_heads, dim = k_raw.shape[2:]
    launch(
        open_kernel,
        (len(opened.slots), kv_heads),
        q=q,
        q_stride=q.stride(0),
        lse=lse,
        q_indptr=queries.indptr,
        q_position=queries.position,
        sequences=len(opened.indptr) - 1,
        k_raw=k_raw,
        page_stride=k_raw.stride(0),
        indptr=opened.indptr,
        slots=opened.slots,
        page_position=opened.position,
        accum=accum,
        accum_stride=accum.stride(0),
        score_scale=sm_scale * LOG2_E,
        HEADS=kv_heads,
        GROUP=q.shape[1] // kv_heads,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        PRECISION=_precision(q.dtype),
        PAGE_TOKENS=PAGE_TOKENS,
        QUERIES=16,
        num_warps=4,
        maxnreg=255,
    )


@score.score_decode.register("gpu")
def score_decode(
    q: torch.Tensor,
    lse: torch.Tensor,
    pages: StepPages,
    keys: torch.Tensor,
    raw_slot: torch.Tensor,
    accum: torch.Tensor,
    sm_scale: float,
) -> None:
    k_raw, table, seq_lens = keys, pages.table, pages.lengths
    kv_heads, dim = k_raw.shape[2:]
    group = q.shape[1] // kv_heads
    launch(
        decode_kernel,
        (len(q), triton.cdiv(table.shape[1], DECODE_PAGES), kv_heads),
        q=q,
        q_stride=q.stride(0),
        lse=lse,
        seq_lens=seq_lens,
        k_raw=k_raw,
        page_stride=k_raw.stride(0),
        table=table,
        table_stride=table.stride(0),
        table_width=table.shape[1],
        raw_slot=raw_slot,
        accum=accum,
        accum_stride=accum.stride(0),
        score_scale=sm_scale * LOG2_E,
        HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        PRECISION=_precision(q.dtype),
        PAGE_TOKENS=PAGE_TOKENS,
        PAGES=DECODE_PAGES,
        num_warps=4,
    )
