# SPDX-License-Identifier: Apache-2.0
"""The pages of a decode step in C++ (cpu.cpp)."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels import step
from sglang_diffxkv.kernels.cpu.abi import int64_words
from sglang_diffxkv.kernels.cpu.function import CFunction
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageMetadata, StepPages, StepRequests

_begin_decode = CFunction("step", "diffxkv_begin_decode")


@step.begin_decode.register("cpu")
def begin_decode(
    requests: StepRequests, metadata: PageMetadata, clock: torch.Tensor, window: int
) -> StepPages:
    req_to_token, req_pool_indices, seq_lens, num_real, queries = requests
    kernel = StepKernel(req_to_token, metadata, window)
    rows, lengths = req_pool_indices.long(), seq_lens.long()
    now, decode_step = clock.tolist()
    return kernel.begin(rows, lengths, int(num_real), now, decode_step, queries)


class StepKernel:
    """``begin_decode`` in one call, for tables that stay where they are.

    Args:
        req_to_token, metadata, window: as for `kernels.step.begin_decode`.
    """

    def __init__(self, req_to_token: torch.Tensor, metadata: PageMetadata, window: int) -> None:
        self._kept = req_to_token, metadata  # alive: the kernel has their addresses
        self._table, self._window = req_to_token, window
        tables = metadata[:-1]
        self._metadata = int64_words(*(0 if t is None else t.data_ptr() for t in tables))

    def begin(
        self,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        num_real: int,
        step: int,
        decode_step: int,
        queries: int = 1,
    ) -> StepPages:
        """`kernels.step.begin_decode` with the time on the host, and lists int64 [B].

        The table is as wide as the longest sequence needs, or wider.

        Args:
            queries: new tokens of each sequence.

        Raises:
            ValueError: a page is neither open nor sealed.
        """
        batch, context = len(req_pool_indices), self._table.shape[1]
        width = -(-context // PAGE_TOKENS)
        lengths, count, last_len = torch.empty(3, batch, dtype=torch.int32).unbind()
        table = torch.empty(batch, width, dtype=torch.int32)
        new_rows = torch.empty(batch * queries, dtype=torch.int64)
        pages = StepPages(table, lengths, count, last_len, new_rows)
        out = int64_words(pages.table.data_ptr(), width, *(t.data_ptr() for t in pages[1:]))
        known = _begin_decode(
            self._table.data_ptr(),
            self._table.stride(0),
            req_pool_indices.data_ptr(),
            seq_lens.data_ptr(),
            batch,
            num_real,
            queries,
            step,
            decode_step,
            self._window,
            self._metadata,
            out,
        )
        if not known:
            raise ValueError("a sequence of the batch has a free page")
        return pages
