# SPDX-License-Identifier: Apache-2.0
"""What a layer does with new tokens before it attends: K and V go to raw pages, queries turn to
the basis that sealed keys are in."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.dispatch import operation

__all__ = ["write_tokens"]


@operation
def write_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
) -> torch.Tensor:
    """Write K and V, and rotate the queries (`kernels.basis.rotation`): one launch. On GPUs only.

    Args:
        q: [T, Hq, D]. k, v: [T, H, D]. Tokens may be strided, what belongs to one is contiguous.
        rows: int64 [T], rows of the flattened raw pages, distinct but for padding.
        k_raw, v_raw: [R, 64, H, D], one layer's; written in their dtype.

    Returns:
        fp32 [T, Hq, D], contiguous.
    """
    return write_tokens.on(q)(q, k, v, rows, k_raw, v_raw)
