# SPDX-License-Identifier: Apache-2.0
"""The pages of a decode step in one launch."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import step
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageMetadata, StepPages, StepRequests
from sglang_diffxkv.kernels.step.triton_kernels import Batch, look_up_pages

_PAGES = 32


@step.begin_decode.register("gpu")
def begin_decode(
    requests: StepRequests, metadata: PageMetadata, clock: torch.Tensor, window: int
) -> StepPages:
    req_to_token, req_pool_indices, seq_lens, num_real, queries = requests
    batch, width = len(seq_lens), triton.cdiv(req_to_token.shape[1], PAGE_TOKENS)
    pages = StepPages(
        table=seq_lens.new_empty(batch, width, dtype=torch.int32),
        lengths=seq_lens.new_empty(batch, dtype=torch.int32),
        count=seq_lens.new_empty(batch, dtype=torch.int32),
        last_len=seq_lens.new_empty(batch, dtype=torch.int32),
        rows=seq_lens.new_empty(batch * queries, dtype=torch.int64),
    )
    launch(
        look_up_pages,
        (batch, triton.cdiv(width, _PAGES)),
        batch=Batch(req_to_token, req_to_token.stride(0), req_pool_indices, seq_lens, num_real),
        clock=clock,
        metadata=metadata,
        window=window,
        out=pages,
        PAGES=_PAGES,
        QUERIES=queries,
        num_warps=4,
    )
    return pages
