# SPDX-License-Identifier: Apache-2.0
"""The attention backend on a GPU: decode steps that CUDA graphs can hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from sglang_diffxkv.attention.decode_backend import DecodeBatch, StepBackend
from sglang_diffxkv.attention.device_decode import DecodeStep, DeviceDecode
from sglang_diffxkv.attention.metadata import ready_pages

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


MOST_ARENA_BYTES = 2**32 * 64
"""Numbers of rows have 32 bits where rows have 64 bytes or more (`payload.arena_row`)."""


class GPUBackend(StepBackend):
    """Prefills as everywhere; of decode steps only the first one after a prefill may wait for the
    device."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        nbytes = self.store.arena.buffer.nbytes
        if nbytes > MOST_ARENA_BYTES:
            raise ValueError(
                f"diffxkv: the pool has {nbytes / 2**30:.0f} GiB of frames, of which kernels reach "
                f"{MOST_ARENA_BYTES >> 30}: lower memory_bytes"
            )
        self.decode = DeviceDecode(
            self.store, self.req_to_token_pool.req_to_token, self.config.window
        )
        self.decode_step: DecodeStep | None = None

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to do: graphs read SGLang's own buffers, and what they write is captured."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        # SGLang's warm-up begins steps that it does not end.
        self.decode_batch = self.forward_metadata = None
        if forward_batch.forward_mode.is_decode():
            self.init_forward_metadata_out_graph(forward_batch)
            self.init_forward_metadata_in_graph(forward_batch)
        else:
            super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a decode step, or its graph's replay: what the host has to tell the device.

        Args:
            forward_batch: SGLang's ``ForwardBatch``, or the view of one that it replays with.
        """
        fb = forward_batch
        if in_capture:
            self.decode.tick(0)
            return
        real = fb.batch_size - getattr(fb, "num_padding", 0)
        batch = DecodeBatch(fb.req_pool_indices[:real], fb.seq_lens[:real], fb.seq_lens_cpu[:real])
        self.begin_decode(batch, fb.out_cache_loc)
        self.decode.tick(real)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        fb = forward_batch
        self.decode_step = self.decode.begin(fb.req_pool_indices, fb.seq_lens)

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
        step = self.decode_step
        assert step is not None and save_kv_cache  # models that write it themselves are hooked
        index = layer.layer_id - self.token_to_kv_pool.start_layer
        q, k, v = (x.view(len(x), -1, layer.qk_head_dim) for x in (q, k, v))
        return self.decode.attend(step, index, q, k, v, layer.scaling).out.flatten(1)

    def _seal(self, batch: DecodeBatch, due: float) -> None:
        if math.isinf(due):
            super()._seal(batch, due)
            return
        store, table = self.store, self.req_to_token_pool.req_to_token
        seq_lens, longest = batch.seq_lens.long(), int(batch.seq_lens_cpu.max())
        scored = seq_lens - 1 if store.policy.needs_scores else seq_lens
        store.seal_ready(*ready_pages(store, table, batch.rows, scored, longest, int(due)))
