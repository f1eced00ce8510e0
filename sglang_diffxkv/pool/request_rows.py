# SPDX-License-Identifier: Apache-2.0
"""What requests asked for, by their rows of SGLang's ``ReqToTokenPool``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.store import PageStore


class RequestRows:
    """Kept up to date when rows are given out and taken back, and read with a batch's rows.

    Attributes:
        quality: uint8 [R], `Quality` of the request in each row.
        req_to_token: int32 [R, max_context], SGLang's table.
    """

    def __init__(self, store: PageStore, req_to_token: torch.Tensor) -> None:
        self.store, self.req_to_token = store, req_to_token
        rows = req_to_token.shape[0]
        self.quality = torch.zeros(rows, dtype=torch.uint8, device=req_to_token.device)

    def enter(self, rows: Sequence[int], quality: Sequence[Quality]) -> None:
        """Requests of these qualities have got these rows, or keep them for their next chunk."""
        device = self.quality.device
        values = torch.tensor([int(level) for level in quality], dtype=torch.uint8, device=device)
        self.quality[torch.tensor(rows, dtype=torch.int64, device=device)] = values

    def leave(self, row: int, tokens: int) -> None:
        """The request in ``row``, which held pages for so many ``tokens``, is about to leave it."""
        self.store.leave(self.req_to_token[row, :tokens:PAGE_TOKENS].long() // PAGE_TOKENS)
