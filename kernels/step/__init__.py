# SPDX-License-Identifier: Apache-2.0
"""The pages of a decode step, looked up, and their use recorded in the directory on its device.

A step has one new token of each sequence, or N of a draft chain that it verifies. Of those only the
first is known to be accepted, so the directory records a sequence as if it ended there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.dispatch import operation

__all__ = ["PageMetadata", "StepPages", "StepRequests", "begin_decode"]


class StepRequests(NamedTuple):
    """The B requests of a decode step, as SGLang has them.

    Attributes:
        req_to_token: int32 [max_requests, max_context], its ``ReqToTokenPool`` table.
        req_pool_indices: int64 (or int32) [B], rows of that table, with padding at the end.
        seq_lens: int64 (or int32) [B], tokens of each, the N new ones included.
        num_real: int32 [1], how many of them are no padding.
        queries: N, new tokens of each.
    """

    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    num_real: torch.Tensor
    queries: int = 1


class PageMetadata(NamedTuple):
    """Tables of the page directory that a decode step writes, and those that it is told by.

    Attributes:
        raw_slot: int32 [V], and sealed: bool [V], read. The others are written, for open pages;
            ``last_used`` for all.
        position, context, filled: int32 [V].
        window_step, last_used: int64 [V].
        counts: fp32 [R, 64] by raw slot, how many queries have scored each token; None: no one
            reads that.
        unread: int32 [1], raised by one for each page of a sequence that is neither open nor
            sealed: attention reads nothing of it. On a CPU that is a ValueError.
    """

    raw_slot: torch.Tensor
    sealed: torch.Tensor
    position: torch.Tensor
    context: torch.Tensor
    filled: torch.Tensor
    window_step: torch.Tensor
    last_used: torch.Tensor
    counts: torch.Tensor | None
    unread: torch.Tensor


class StepPages(NamedTuple):
    """Pages of the B sequences of a decode step; rows of padding have none.

    Attributes:
        table: int32 [B, P], page ids by position; anything behind a sequence's last page.
        lengths: int32 [B], tokens of each sequence, the N new ones included.
        count: int32 [B], pages.
        last_len: int32 [B], tokens of the last page.
        rows: int64 [B * N], raw-page row that each new token is written to, sequence by sequence;
            0 for padding, and where a page is not open.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    count: torch.Tensor
    last_len: torch.Tensor
    rows: torch.Tensor

    @property
    def queries(self) -> int:
        """N, new tokens of each sequence."""
        return len(self.rows) // len(self.count)


@operation
def begin_decode(
    requests: StepRequests, metadata: PageMetadata, clock: torch.Tensor, window: int
) -> StepPages:
    """Look up the pages of a decode batch, and record that they are about to be used.

    Does what `gather_pages`, `note_use` and `count_scores` of ``attention`` do, with shapes
    that depend on the batch size only: no host sync, fit for a CUDA graph. On a CPU servers use
    `cpu.StepKernel`, which keeps what stays from step to step.

    Args:
        metadata: of the store's directory; written, as if a sequence of n tokens had
            ``n - queries + 1``. A page that begins behind those has ``filled`` 0.
        clock: int64 [2], step and decode step of the store.
        window: recent tokens that a running sequence wants to keep raw.
    """
    return begin_decode.on(clock)(requests, metadata, clock, window)
