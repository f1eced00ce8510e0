# SPDX-License-Identifier: Apache-2.0
"""What a layer does with new tokens before it attends: K and V go to raw pages, queries turn to
the basis that sealed keys are in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.dispatch import operation

__all__ = ["NewQKV", "write_tokens"]


class NewQKV(NamedTuple):
    """What a layer has of T new tokens, and where it goes.

    Attributes:
        q: [T, Hq, D]. k, v: [T, H, D]. Tokens may be strided, what belongs to one is contiguous.
        rows: int64 [T], rows of the flattened raw pages, distinct but for padding.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor


@operation
def write_tokens(new: NewQKV, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write K and V, and rotate the queries (`kernels.basis.rotation`): one launch. On GPUs only.

    Args:
        keys, values: [R, 64, H, D], one layer's raw pages; written in their dtype.

    Returns:
        fp32 [T, Hq, D], contiguous.
    """
    return write_tokens.on(keys)(new, keys, values)
