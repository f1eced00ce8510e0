# SPDX-License-Identifier: Apache-2.0
"""The arena: one byte tensor of fixed-size frames for all layers and heads."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.arena import return_frames, stack_ids, take_frames
from sglang_diffxkv.pool.lazy_zeros import lazy_zeros


class FrameArena:
    """Frames and the stack of free ones. How many may be taken is the ledger's business.

    Attributes:
        buffer: uint8 [F, frame_bytes].
        stack: int32 [F], free frames in ``[0, num_free)``, as `kernels.arena` keeps them.
        num_free: int32 [1], on the device so that taking frames needs no host sync.
    """

    def __init__(
        self, num_frames: int, frame_bytes: int, device: str, buffer: torch.Tensor | None = None
    ) -> None:
        """``buffer``: where the frames lie, if not on the device, on which the stack is."""
        if buffer is None:
            buffer = lazy_zeros(num_frames, frame_bytes, dtype=torch.uint8, device=device)
        self.buffer = buffer
        self.stack = lazy_zeros(num_frames, dtype=torch.int32, device=device)
        self.num_free = torch.full((1,), num_frames, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes + self.stack.nbytes + self.num_free.nbytes

    def free_ids(self) -> torch.Tensor:
        """Ids of the free frames, int64; waits for the device."""
        return stack_ids(self.stack, int(self.num_free))

    def take(self, counts: torch.Tensor, max_frames: int) -> torch.Tensor:
        """Take ``counts`` (int32 [N]) frames each; int32 [N, max_frames], -1 where unused."""
        return take_frames(self.stack, self.num_free, counts, max_frames)

    def give_back(self, frames: torch.Tensor) -> None:
        """Return every id >= 0 of ``frames`` (int32, any shape)."""
        return_frames(self.stack, self.num_free, frames)
