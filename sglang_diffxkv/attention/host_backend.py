# SPDX-License-Identifier: Apache-2.0
"""The attention backend on a CPU: decode steps in a few calls of C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_diffxkv.attention.backend import DecodeBatch, DiffXKVBackend
from sglang_diffxkv.attention.host_decode import HostDecode
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.pool.running import RunningRequests
from sglang_diffxkv.pool.store import PageStore

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class HostBackend(DiffXKVBackend):
    """Prefills as everywhere."""

    decode: HostDecode

    def __init__(
        self,
        store: PageStore,
        req_to_token: torch.Tensor,
        config: DiffXKVConfig,
        running: RunningRequests,
    ) -> None:
        super().__init__(store, req_to_token, config, running)
        self.decode = HostDecode(store, req_to_token, config.window)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        fb = forward_batch
        self.decode_batch = self.forward_metadata = None
        if not fb.forward_mode.is_decode():
            self.begin_prefill(fb)
            return
        batch = DecodeBatch(fb.req_pool_indices.long(), fb.seq_lens.long(), fb.seq_lens_cpu)
        self.begin_decode(batch, fb.out_cache_loc)
        self.decode.begin(batch.req_pool_indices, batch.seq_lens)
