# SPDX-License-Identifier: Apache-2.0
"""Host memory behind the arena: where the payload of sealed pages lies while nobody reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.pool.arena import FrameArena
from sglang_diffxkv.pool.directory import PageDirectory
from sglang_diffxkv.pool.lazy_zeros import lazy_zeros, pinned_zeros
from sglang_diffxkv.pool.loading import Loading

Listener = Callable[[torch.Tensor], None]


class HostLevel:
    """Frames in host memory, and what the directory does not say of pages that have them.

    Which frames a page has there stands in the directory's own table. Their free stack is on the
    device: pages move out and back without the host being asked.

    Attributes:
        arena: ``arena.buffer`` is pinned memory of the host.
        heads: int32 [L, V, H, 2], records of pages on the host. The directory's are 0, so that
            whoever attends to such a page by mistake reads nothing that is not there.
        loading: payload that is on its way back.
        on_offload, on_load_back: called with pages (int64 [N]) that have gone there, or come back.
    """

    def __init__(self, num_frames: int, directory: PageDirectory, layout: PageLayout) -> None:
        device = directory.heads.device
        buffer = pinned_zeros(num_frames, layout.frame_bytes, device=device)
        self.arena = FrameArena(num_frames, layout.frame_bytes, str(device), buffer)
        self.heads = lazy_zeros(*directory.heads.shape, dtype=torch.int32, device=device)
        self.loading = Loading(directory.heads.shape[0], device)
        self.on_offload: list[Listener] = []
        self.on_load_back: list[Listener] = []

    @property
    def table_bytes(self) -> int:
        """Bytes on the device."""
        return self.heads.nbytes + self.arena.stack.nbytes + self.arena.num_free.nbytes

    @staticmethod
    def table_bytes_per_page(num_layers: int, layout: PageLayout) -> int:
        """What one more virtual page costs on the device, for sizing."""
        return num_layers * layout.num_kv_heads * 8
