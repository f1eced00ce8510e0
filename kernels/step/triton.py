# SPDX-License-Identifier: Apache-2.0
"""The pages of a decode step in one launch."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import step
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageMetadata, StepPages
from sglang_diffxkv.kernels.step.triton_kernels import look_up_pages

_PAGES = 32


@step.begin_decode.register("gpu")
def begin_decode(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    num_real: torch.Tensor,
    clock: torch.Tensor,
    metadata: PageMetadata,
    window: int,
) -> StepPages:
    rows = req_pool_indices
    batch, width = len(rows), triton.cdiv(req_to_token.shape[1], PAGE_TOKENS)
    pages = StepPages(
        table=rows.new_empty(batch, width, dtype=torch.int32),
        lengths=rows.new_empty(batch, dtype=torch.int32),
        count=rows.new_empty(batch, dtype=torch.int32),
        last_len=rows.new_empty(batch, dtype=torch.int32),
        rows=rows.new_empty(batch, dtype=torch.int64),
    )
    outputs = pages._asdict()
    new_rows = outputs.pop("rows")
    tables = metadata._asdict()
    counts = tables.pop("counts")
    launch(
        look_up_pages,
        (batch, triton.cdiv(width, _PAGES)),
        req_to_token=req_to_token,
        context=req_to_token.stride(0),
        rows=rows,
        seq_lens=seq_lens,
        num_real=num_real,
        clock=clock,
        counts=metadata.raw_slot if counts is None else counts,
        window=window,
        **{f"page_{name}": table for name, table in tables.items()},
        new_rows=new_rows,
        **outputs,
        width=width,
        HAS_COUNTS=counts is not None,
        PAGE_TOKENS=PAGE_TOKENS,
        PAGES=_PAGES,
        num_warps=4,
    )
    return pages
