# SPDX-License-Identifier: Apache-2.0
"""The free stack in vectorised torch: no loop, no wait for the device."""

from __future__ import annotations

import torch


def take_frames(
    stack: torch.Tensor, n_free: torch.Tensor, counts: torch.Tensor, max_frames: int
) -> torch.Tensor:
    """Pop frames for several owners at once.

    Args:
        stack: int32 [F], free frame ids in ``[0, n_free)``.
        n_free: int32 [1], lowered in place by ``counts.sum()``.
        counts: integer [N], frames wanted by each owner, each <= max_frames; their sum is at most
            ``n_free`` (the caller's accounting on the host guarantees it; it is not checked here,
            as that would wait for the device).
        max_frames: width of the result.

    Returns:
        int32 [N, max_frames], frame ids from the left, -1 where unused.
    """
    column = torch.arange(max_frames, device=stack.device)
    wanted = column < counts[:, None]
    first = counts.cumsum(0) - counts
    depth = first[:, None] + column  # how far below the top of the stack
    index = (n_free - 1 - depth).clamp_(min=0)
    frames = torch.where(wanted, stack[index], -1)
    n_free -= counts.sum().to(n_free.dtype)
    return frames


def return_frames(stack: torch.Tensor, n_free: torch.Tensor, frames: torch.Tensor) -> None:
    """Push every frame id >= 0 of a table of any shape.

    Args:
        stack: int32 [F], written at ``[n_free, n_free + pushed)``.
        n_free: int32 [1], raised in place by the number of ids pushed.
        frames: int32 of any shape; negative entries are skipped. Ids must be distinct and taken.
    """
    ids = frames.reshape(-1)
    if ids.numel() == 0:
        return
    valid = ids >= 0
    rank = valid.cumsum(0)
    pushed = rank[-1]
    # Entries to skip must write something too, or the shapes would depend on the data: they repeat
    # the write of the last valid entry, or, where there is none, rewrite what is at the top.
    last = (valid * torch.arange(1, len(ids) + 1, device=ids.device)).argmax()
    top = (n_free + pushed - 1).clamp_(min=0)
    filler = torch.where(pushed > 0, ids[last], stack[top])
    target = torch.where(valid, n_free + rank - 1, top)
    stack[target] = torch.where(valid, ids, filler)
    n_free += pushed.to(n_free.dtype)
