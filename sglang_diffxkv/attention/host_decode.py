# SPDX-License-Identifier: Apache-2.0
"""A decode step on a CPU: one call of C++ for the batch, and one for each layer."""

from __future__ import annotations

import torch

from sglang_diffxkv.attention.batch_pages import page_metadata
from sglang_diffxkv.attention.decode_batch import StepTokens
from sglang_diffxkv.kernels.decode.layer import DecodeLayers, LayerTables, SealedLayers
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages
from sglang_diffxkv.kernels.step.cpu import StepKernel
from sglang_diffxkv.pool.store import PageStateError, PageStore


class HostDecode:
    """Decode steps of one page store.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
        window: recent tokens that a running sequence wants to keep raw.
    """

    def __init__(self, store: PageStore, req_to_token: torch.Tensor, window: int) -> None:
        self._recency = store.recency
        d, raw = store.directory, store.raw
        scores = raw.scores if store.policy.needs_scores else None
        means = store.key_means.by_layer
        sealed = SealedLayers(store.arena.buffer, d.frames, d.heads, means, store.layout)
        self._layers = DecodeLayers(LayerTables(d.raw_slot, raw.keys, raw.values, scores, sealed))
        self._step = StepKernel(req_to_token, page_metadata(store), window)

    def begin(self, tokens: StepTokens) -> StepPages:
        """Look up the batch's pages, and note their use.

        Args:
            tokens: of B sequences.

        Raises:
            PageStateError: a page is free, or one of the new tokens' sealed.
        """
        rows, seq_lens = tokens.req_pool_indices.long(), tokens.seq_lens.long()
        now = self._recency.step, self._recency.decode_step
        try:
            pages = self._step.begin(rows, seq_lens, len(seq_lens), *now, tokens.queries)
        except ValueError as problem:
            raise PageStateError(str(problem)) from problem
        if int(pages.rows.min()) < PAGE_TOKENS:
            raise PageStateError("write into a page that is not open")
        self._layers.begin(pages)
        return pages

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """`DecodeLayers.attend` of this step, of whatever dtype and strides the model has."""
        q, k, v = (fitting(x, self._layers.dtype) for x in (q, k, v))
        return self._layers.attend(layer, q, k, v, softmax)


def fitting(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` [B, heads, D] as `DecodeLayers` takes it: a copy where it is not."""
    if x.dtype == dtype and x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x
    return x.to(dtype).contiguous()
