# SPDX-License-Identifier: Apache-2.0
"""The attention backend on a GPU: decode steps that CUDA graphs can hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sglang.srt.layers.attention.verify_mask import VerifyMask, maybe_create_verify_mask

from sglang_diffxkv.attention.backend import DiffXKVBackend
from sglang_diffxkv.attention.decode_batch import DecodeBatch, decode_batch, step_tokens
from sglang_diffxkv.attention.device_decode import DeviceDecode
from sglang_diffxkv.attention.ready_pages import ready_pages
from sglang_diffxkv.kernels.extend.scratch import make_scratch
from sglang_diffxkv.pool.sealing import seal_ready

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

MOST_ARENA_BYTES = 2**32 * 64
"""Numbers of rows have 32 bits where rows have 64 bytes or more (`payload.arena_row`)."""


class DeviceBackend(DiffXKVBackend):
    """Prefills as everywhere; of decode steps only the first one after a prefill may wait for the
    device.

    Raises:
        ValueError: kernels do not reach all of the store's frames.
    """

    decode: DeviceDecode
    _verify_mask: VerifyMask | None = None

    def prepare(self) -> None:
        store, table = self.store, self.req_to_token
        nbytes = store.arena.buffer.nbytes
        if nbytes > MOST_ARENA_BYTES:
            raise ValueError(
                f"diffxkv: the pool has {nbytes / 2**30:.0f} GiB of frames, of which kernels reach "
                f"{MOST_ARENA_BYTES >> 30}: lower memory_bytes"
            )
        self.decode = DeviceDecode(store, table, self.config.window)
        self.scratch = make_scratch(store.layout, store.raw.keys[0].dtype, table.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Graphs read SGLang's own buffers, and what they write is captured. Where they verify,
        workers want a mask to fill: drafts are chains, so nobody reads it."""
        self._verify_mask = maybe_create_verify_mask(
            is_draft_runner=False,
            skip_prefill=max_num_tokens == max_bs,
            max_bs=max_bs,
            max_context_len=self.req_to_token.shape[1],
            num_draft_tokens=max_num_tokens // max_bs,
            device=self.req_to_token.device,
            is_read=False,
        )

    @property
    def verify_mask(self) -> VerifyMask | None:
        return self._verify_mask

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.decode_batch = self.forward_metadata = None
        mode = forward_batch.forward_mode
        if mode.is_decode() or mode.is_target_verify():
            super().init_forward_metadata(forward_batch)  # SGLang's: out of the graph, then in it
        else:
            self.begin_prefill(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a decode step or a verification, or its graph's replay: what to tell the device.

        Args:
            forward_batch: SGLang's ``ForwardBatch``, or the view of one that it replays with.
        """
        if in_capture:
            self.decode.tick(0)
            return
        self.store.wait_for_host()
        batch = decode_batch(forward_batch)
        self.begin_decode(batch)
        self.decode.tick(len(batch.seq_lens_cpu))

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        tokens = step_tokens(forward_batch)
        self.decode.begin(tokens)
        if self.windows is not None:
            self.windows.begin_decode(tokens)

    def seal_decoded(self, batch: DecodeBatch, due: float) -> None:
        if math.isinf(due):
            super().seal_decoded(batch, due)
            return
        table, scored_lens = self.pages_of(batch), self.scored_lens(batch)
        seal_ready(self.store, *ready_pages(self.store, table, scored_lens, int(due)))
