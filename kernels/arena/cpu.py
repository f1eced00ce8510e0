# SPDX-License-Identifier: Apache-2.0
"""The free stack in vectorised torch: no loop, no wait for the device. Copies in parts."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels import arena

COPIED_AT_ONCE = 4 << 20
"""Bytes: what lies in between stays in a core's cache, more or less."""


@arena.take_frames.register("cpu")
def take_frames(
    stack: torch.Tensor, n_free: torch.Tensor, counts: torch.Tensor, max_frames: int
) -> torch.Tensor:
    column = torch.arange(max_frames, device=stack.device)
    wanted = column < counts[:, None]
    first = counts.cumsum(0) - counts
    depth = first[:, None] + column  # how far below the top of the stack
    index = (n_free - 1 - depth).clamp_(min=0)
    frames = torch.where(wanted, stack[index] + index.to(stack.dtype), -1)
    n_free -= counts.sum().to(n_free.dtype)
    return frames


@arena.return_frames.register("cpu")
def return_frames(stack: torch.Tensor, n_free: torch.Tensor, frames: torch.Tensor) -> None:
    ids = frames.reshape(-1)
    if ids.numel() == 0:
        return
    valid = ids >= 0
    ordinal = valid.cumsum(0)
    pushed = ordinal[-1]
    # Entries to skip must write something too, or the shapes would depend on the data: they repeat
    # the write of the last valid entry, or, where there is none, rewrite what is at the top.
    last = (valid * torch.arange(1, len(ids) + 1, device=ids.device)).argmax()
    top = (n_free + pushed - 1).clamp_(min=0)
    filler = torch.where(pushed > 0, ids[last] - top, stack[top])
    target = torch.where(valid, n_free + ordinal - 1, top)
    stack[target] = torch.where(valid, ids - target, filler).to(stack.dtype)
    n_free += pushed.to(n_free.dtype)


@arena.copy_frames.register("cpu")
def copy_frames(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> None:
    there = source_ids >= 0
    old, new = source_ids[there].long(), target_ids[there].long()
    at_once = max(1, COPIED_AT_ONCE // source.shape[1])
    for some, places in zip(old.split(at_once), new.split(at_once), strict=True):
        target[places] = source[some]
