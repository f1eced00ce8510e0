# SPDX-License-Identifier: Apache-2.0
"""Taking frames from the arena's free stack and giving them back, by prefix sums.

The free stack is an int32 [F] tensor whose entries ``[0, n_free)`` are the ids of the free frames;
``n_free`` is an int32 [1] tensor on the same device, changed in place, so that neither operation
waits for the device. Both are one fixed sequence of tensor operations, whatever the counts.
"""

from __future__ import annotations

from sglang_diffxkv.kernels.arena.torch_ops import return_frames, take_frames

__all__ = ["return_frames", "take_frames"]
