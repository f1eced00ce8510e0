# SPDX-License-Identifier: Apache-2.0
"""Causal attention over open pages for all layers of one step, planned once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_diffxkv.kernels.attention_part import AttentionPart
from sglang_diffxkv.kernels.extend import flashinfer
from sglang_diffxkv.kernels.extend.open import (
    OpenSequence,
    attend_sequences,
    extend_open,
    list_sequences,
)

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper


class OpenPrefill:
    """`extend_open` of one step's queries: FlashInfer where it can, our kernels elsewhere.

    Only the latest object may run: FlashInfer's plan lives in a wrapper that all share.
    """

    def __init__(
        self,
        q_indptr: torch.Tensor,
        q_position: torch.Tensor,
        indptr: torch.Tensor,
        slots: torch.Tensor,
        page_position: torch.Tensor,
        last_len: torch.Tensor,
    ) -> None:
        """Remember the step's sequences; nothing is computed yet.

        Args:
            q_indptr, q_position, indptr, slots, page_position: as in `extend_open`, but a
                sequence's listed pages end with that of its last new token.
            last_len: int32 [B], tokens in each sequence's last page, 1 to 64.
        """
        self._q_indptr, self._q_position = q_indptr, q_position
        self._indptr, self._slots, self._page_position = indptr, slots, page_position
        self._last_len = last_len
        self._sequences: list[OpenSequence] | None = None
        self._planned: tuple[BatchPrefillWithPagedKVCacheWrapper, float] | None = None

    def run(
        self, q: torch.Tensor, k_raw: torch.Tensor, v_raw: torch.Tensor, sm_scale: float
    ) -> AttentionPart:
        """Attention of one layer; arguments as in `extend_open`.

        The first layer plans for all. So does one whose scale differs from the last one's.
        """
        where = (self._indptr, self._slots, self._page_position)
        if not flashinfer.supports(q):
            if not q.is_cpu:
                new = self._q_indptr, self._q_position
                return extend_open(q, *new, k_raw, v_raw, *where, sm_scale)
            if self._sequences is None:
                self._sequences = list_sequences(self._q_indptr, self._q_position, *where)
            return attend_sequences(q, k_raw, v_raw, self._sequences, sm_scale)
        if self._planned is None or self._planned[1] != sm_scale:
            wrapper = flashinfer.plan(
                q, self._q_indptr, k_raw, self._indptr, self._slots, self._last_len, sm_scale
            )
            self._planned = wrapper, sm_scale
        return flashinfer.run(self._planned[0], q, k_raw, v_raw)
