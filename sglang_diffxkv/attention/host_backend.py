# SPDX-License-Identifier: Apache-2.0
"""The attention backend on a CPU: decode steps in a few calls of C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_diffxkv.attention.backend import DecodeBatch, DiffXKVBackend
from sglang_diffxkv.attention.host_decode import HostDecode
from sglang_diffxkv.attention.verify import begin_verify

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class HostBackend(DiffXKVBackend):
    """Prefills as everywhere."""

    decode: HostDecode

    def prepare(self) -> None:
        self.decode = HostDecode(self.store, self.req_to_token, self.config.window)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        fb = forward_batch
        self.decode_batch = self.forward_metadata = None
        if fb.forward_mode.is_target_verify():
            begin_verify(self, fb)
            return
        if not fb.forward_mode.is_decode():
            self.begin_prefill(fb)
            return
        batch = DecodeBatch(fb.req_pool_indices.long(), fb.seq_lens.long(), fb.seq_lens_cpu)
        self.begin_decode(batch)
        self.decode.begin(batch.req_pool_indices, batch.seq_lens)
