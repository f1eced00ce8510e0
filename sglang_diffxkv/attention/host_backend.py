# SPDX-License-Identifier: Apache-2.0
"""The attention backend on a CPU with a compiler: decode steps in a few calls of C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_diffxkv.attention.decode_backend import DecodeBatch, StepBackend
from sglang_diffxkv.attention.host_decode import HostDecode

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class CPUBackend(StepBackend):
    """Prefills as everywhere."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        table = self.req_to_token_pool.req_to_token
        self.decode = HostDecode(self.store, table, self.config.window)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        fb = forward_batch
        self.decode_batch = self.forward_metadata = None
        if not fb.forward_mode.is_decode():
            super().init_forward_metadata(fb)
            return
        batch = DecodeBatch(fb.req_pool_indices.long(), fb.seq_lens.long(), fb.seq_lens_cpu)
        self.begin_decode(batch, fb.out_cache_loc)
        self.decode.begin(batch.rows, batch.seq_lens)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of one new token per sequence: q [B, Hq * D] -> [B, Hq * D]."""
        assert save_kv_cache  # models that write it themselves are hooked
        index, dim = layer.layer_id - self.token_to_kv_pool.start_layer, layer.qk_head_dim
        k, v = (x.view(-1, layer.tp_k_head_num, dim) for x in (k, v))
        part = self.decode.attend(index, q.view(-1, layer.tp_q_head_num, dim), k, v, layer.scaling)
        return part.out.flatten(1)
