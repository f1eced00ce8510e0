# SPDX-License-Identifier: Apache-2.0
"""A decode step on the GPU, whose shapes are fixed by the batch size, and which no host waits for.

`begin` and what follows may be captured in a CUDA graph; `tick` runs before each replay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.attention.batch_pages import page_metadata
from sglang_diffxkv.attention.decode_batch import StepTokens
from sglang_diffxkv.kernels.decode.triton import attend
from sglang_diffxkv.kernels.decode.work import SequencePages, WorkTiles, divide_work
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.score import RawTables, score_decode
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages, StepRequests, begin_decode
from sglang_diffxkv.kernels.write import NewQKV, write_tokens
from sglang_diffxkv.pool.store import PageStore


class DecodeStep(NamedTuple):
    """What all layers of one decode step share.

    Attributes:
        pages: the batch's pages.
        work: of all layers.
    """

    pages: StepPages
    work: WorkTiles


class DeviceDecode:
    """Decode steps of one page store.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
        window: recent tokens that a running sequence wants to keep raw.
    """

    def __init__(self, store: PageStore, req_to_token: torch.Tensor, window: int) -> None:
        self.store = store
        self._window = window
        self._req_to_token = req_to_token
        device = req_to_token.device
        self._clock = torch.zeros(2, dtype=torch.int64, device=device)
        self._num_real = torch.zeros(1, dtype=torch.int32, device=device)
        self._metadata = page_metadata(store)
        self._step: DecodeStep | None = None

    def tick(self, num_real: int) -> None:
        """Tell the device the time, and how many sequences of the batch are no padding."""
        self._clock[:1].fill_(self.store.recency.step)  # assigned, a number waits for the device
        self._clock[1:].fill_(self.store.recency.decode_step)
        self._num_real.fill_(num_real)

    def begin(self, tokens: StepTokens) -> DecodeStep:
        """Look up the batch's pages, note their use, and divide the work of the step that follows.

        Args:
            tokens: of B sequences, with padding at the end.
        """
        store, (rows, seq_lens, queries) = self.store, tokens
        requests = StepRequests(self._req_to_token, rows, seq_lens, self._num_real, queries)
        pages = begin_decode(requests, self._metadata, self._clock, self._window)
        batch, width = pages.table.shape
        first = torch.arange(0, batch * width, width, dtype=torch.int32, device=seq_lens.device)
        raw_slot = store.directory.raw_slot
        sequences = SequencePages(
            pages.table.flatten(), first, pages.count, raw_slot, pages.last_len
        )
        work = divide_work(sequences, store.directory.heads, store.layout)
        self._step = DecodeStep(pages, work)
        return self._step

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """Attention of the new tokens over all that is kept of one layer, themselves included.

        Four launches, or three where nothing is scored.

        Args:
            q: [B * N, Hq, D]. k, v: [B * N, H, D], N new tokens of each sequence, which are
                written to raw pages first.

        Returns:
            Its output is of q's dtype.
        """
        assert self._step is not None
        step, store = self._step, self.store
        pages = store.layer_pages(layer)
        rotated = write_tokens(NewQKV(q, k, v, step.pages.rows), pages.keys, pages.values)
        q_sealed = rotated if store.layout.rotates else q
        state = attend(q, q_sealed, pages, step.work.layer(layer), softmax, q.dtype)
        if store.policy.needs_scores:
            raw = RawTables(pages.keys, store.directory.raw_slot, store.raw.scores[layer])
            score_decode(q, state.lse, step.pages, raw, softmax)
        return state
