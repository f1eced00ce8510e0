# SPDX-License-Identifier: Apache-2.0
"""Readable reference: one frame after the other."""

from __future__ import annotations

import torch


def take_frames(
    stack: torch.Tensor, n_free: torch.Tensor, counts: torch.Tensor, max_frames: int
) -> torch.Tensor:
    """Pop ``counts[i]`` frames for each i; see `arena.take_frames`."""
    frames = torch.full((len(counts), max_frames), -1, dtype=torch.int32)
    top = int(n_free)
    for i, count in enumerate(counts.tolist()):
        for j in range(count):
            top -= 1
            frames[i, j] = stack[top] + top
    n_free[0] = top
    return frames


def return_frames(stack: torch.Tensor, n_free: torch.Tensor, frames: torch.Tensor) -> None:
    """Push every id >= 0; see `arena.return_frames`."""
    top = int(n_free)
    for frame in frames.reshape(-1).tolist():
        if frame >= 0:
            stack[top] = frame - top
            top += 1
    n_free[0] = top


def copy_frames(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> None:
    """Copy frame by frame; see `arena.copy_frames`."""
    pairs = zip(source_ids.flatten().tolist(), target_ids.flatten().tolist(), strict=True)
    for old, new in pairs:
        if old >= 0:
            target[new] = source[old]
