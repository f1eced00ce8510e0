# SPDX-License-Identifier: Apache-2.0
"""A kernel that does nothing but number rows of an arena."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.payload import arena_row


@triton.jit
def _number(frames, rows, out, N: tl.constexpr, FRAME: tl.constexpr, ROW: tl.constexpr):
    at = tl.arange(0, N)
    row = arena_row(frames + 0 * at, tl.load(rows + at), FRAME, ROW)
    tl.store(out + at, row.to(tl.int64))


def arena_rows(
    frames: torch.Tensor, rows: torch.Tensor, frame_bytes: int, row_bytes: int
) -> torch.Tensor:
    """int64 numbers in the arena of rows int32 [N] in the virtual space of ``frames`` [1, F]."""
    out = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    _number[(1,)](frames, rows, out, len(rows), frame_bytes, row_bytes)
    return out
