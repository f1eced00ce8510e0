# SPDX-License-Identifier: Apache-2.0
"""What decode steps share that run from a plan of their own, not as prefills of one token do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sglang_diffxkv.attention.backend import DiffXKVBackend
from sglang_diffxkv.attention.full_pages import FullPages
from sglang_diffxkv.attention.metadata import gather_pages, pages_to_seal
from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS


class DecodeBatch(NamedTuple):
    """The sequences of a decode step, padding left out; lengths include the step's tokens.

    Attributes:
        rows, seq_lens: int64 [B]. seq_lens_cpu: int64 [B] on the host.
    """

    rows: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor


class StepBackend(DiffXKVBackend):
    """Prefills as everywhere; decode steps note what the host knows, and seal when it is worth it.

    Attributes:
        decode_batch: of the decode step that runs; None: a prefill, or SGLang's warm-up.
    """

    decode_batch: DecodeBatch | None = None

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.full_pages = FullPages(self.config.window, self.store.policy.needs_scores)

    def begin_decode(self, batch: DecodeBatch, loc: torch.Tensor) -> None:
        """Count the step's tokens; note what they asked for whose next page was opened for it.

        Args:
            loc: int64 [B], token slots that they are written to.
        """
        self.store.begin_step(decodes=True)
        self.decode_batch = batch
        noted = self._count_tokens(batch.seq_lens_cpu - 1, batch.seq_lens_cpu)
        if noted is None:
            return
        opened = (batch.seq_lens_cpu % PAGE_TOKENS == 1).nonzero().flatten()
        index = upload(opened, loc.device)
        quality = self.rows.quality[batch.rows[index]]
        self.store.set_quality(loc[index] // PAGE_TOKENS, quality, noted)

    def end_of_step(self) -> None:
        batch, self.decode_batch = self.decode_batch, None
        if batch is None:
            super().end_of_step()
            self.full_pages.expect_any()
        elif due := self.full_pages.due(batch.seq_lens_cpu):
            self._seal(batch, due)

    def _seal(self, batch: DecodeBatch, due: float) -> None:
        """Seal what is full, scored and not recent, about ``due`` pages.

        After a prefill that may be any number of pages, and many of one sequence, which are judged
        together: to list them is to wait for the device, as prefills do.
        """
        store, seq_lens = self.store, batch.seq_lens.long()
        table, longest = self.req_to_token_pool.req_to_token, int(batch.seq_lens_cpu.max())
        pages = gather_pages(store, table, batch.rows, seq_lens, longest)
        scored = seq_lens - 1 if store.policy.needs_scores else seq_lens
        store.seal(*pages_to_seal(store, pages, scored))
