# SPDX-License-Identifier: Apache-2.0
"""What a layer does with new tokens before it attends: K and V go to raw pages, queries turn to
the basis that sealed keys are in."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.write import naive

__all__ = ["write_tokens"]


def write_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
) -> torch.Tensor:
    """Write K and V, and rotate the queries (`kernels.basis.rotation`): one launch on a GPU.

    Args:
        q: [T, Hq, D]. k, v: [T, H, D]. Tokens may be strided, what belongs to one is contiguous.
        rows: int64 [T], rows of the flattened raw pages, distinct but for padding.
        k_raw, v_raw: [R, 64, H, D], one layer's; written in their dtype.

    Returns:
        fp32 [T, Hq, D], contiguous.
    """
    if on_gpu(q):
        from sglang_diffxkv.kernels.write import triton  # not installed everywhere

        return triton.write_tokens(q, k, v, rows, k_raw, v_raw)
    return naive.write_tokens(q, k, v, rows, k_raw, v_raw)
