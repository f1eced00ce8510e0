# SPDX-License-Identifier: Apache-2.0
"""Taking frames from an arena's free stack and giving them back, by prefix sums; copying frames.

The free stack is an int32 [F] tensor whose entries ``[0, n_free)`` tell the free frames: entry i is
the id less i, so that a stack of zeros is a full one, and a pool of any size starts without writing
it. ``n_free`` is an int32 [1] tensor on the same device, changed in place, so that neither
operation waits for the device. Both are one fixed sequence of operations, whatever the counts.
"""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.dispatch import operation

__all__ = ["copy_frames", "return_frames", "stack_ids", "take_frames"]


@operation
def take_frames(
    stack: torch.Tensor, n_free: torch.Tensor, counts: torch.Tensor, max_frames: int
) -> torch.Tensor:
    """Pop frames for several owners at once.

    Args:
        stack: int32 [F], free frames in ``[0, n_free)``, each as its id less its place.
        n_free: int32 [1], lowered in place by ``counts.sum()``.
        counts: integer [N], frames wanted by each owner, each <= max_frames; their sum is at most
            ``n_free`` (the caller's accounting on the host guarantees it; it is not checked here,
            as that would wait for the device).
        max_frames: width of the result.

    Returns:
        int32 [N, max_frames], frame ids from the left, -1 where unused.
    """
    return take_frames.on(stack)(stack, n_free, counts, max_frames)


@operation
def return_frames(stack: torch.Tensor, n_free: torch.Tensor, frames: torch.Tensor) -> None:
    """Push every frame id >= 0 of a table of any shape, in its order.

    Args:
        stack: int32 [F], written at ``[n_free, n_free + pushed)``.
        n_free: int32 [1], raised in place by the number of ids pushed.
        frames: int32 of any shape; negative entries are skipped. Ids must be distinct and taken.
    """
    return_frames.on(stack)(stack, n_free, frames)


@operation
def copy_frames(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> None:
    """Copy frames between arenas, of which one may be pinned memory of the host.

    Args:
        source, target: uint8 [F, frame_bytes], contiguous; frame_bytes is a multiple of 16.
        source_ids, target_ids: int32 of one shape, negative where there is nothing to copy, in the
            same places.
    """
    copy_frames.on(source_ids)(source, source_ids, target, target_ids)


def stack_ids(stack: torch.Tensor, count: int) -> torch.Tensor:
    """Frame ids in the entries ``[0, count)`` of a stack: int64 [count]."""
    return stack[:count] + torch.arange(count, device=stack.device)
