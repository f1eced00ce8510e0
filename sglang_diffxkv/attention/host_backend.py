# SPDX-License-Identifier: Apache-2.0
"""The attention backend on a CPU: decode steps in a few calls of C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_diffxkv.attention.backend import DiffXKVBackend
from sglang_diffxkv.attention.decode_batch import decode_batch, step_tokens
from sglang_diffxkv.attention.host_decode import HostDecode

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
        if fb.forward_mode.is_decode() or fb.forward_mode.is_target_verify():
            self.begin_decode(decode_batch(fb))
            tokens = step_tokens(fb)
            self.decode.begin(tokens)
            if self.windows is not None:
                self.windows.begin_decode(tokens)
        else:
            self.begin_prefill(fb)
