# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels that merge attention states. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.merge.state import AttentionState
from sglang_diffxkv.kernels.merge.triton_kernels import merge_two

_MERGE_ROWS = 16


def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """See `merge.merge_states`; one pass over each of the two."""
    rows, dim = a.lse.numel(), a.out.shape[-1]
    merged = AttentionState(
        torch.empty(a.out.shape, dtype=torch.float32, device=a.out.device),
        torch.empty(a.lse.shape, dtype=torch.float32, device=a.lse.device),
    )
    launch(
        merge_two,
        (triton.cdiv(rows, _MERGE_ROWS),),
        out_a=a.out.contiguous(),
        lse_a=a.lse.contiguous(),
        out_b=b.out.contiguous(),
        lse_b=b.lse.contiguous(),
        out=merged.out,
        lse=merged.lse,
        rows=rows,
        DIM=dim,
        DIM_BLOCK=triton.next_power_of_2(dim),
        ROWS=_MERGE_ROWS,
        num_warps=4,
    )
    return merged
