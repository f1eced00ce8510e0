# SPDX-License-Identifier: Apache-2.0
"""The basis in which sealed keys and values are quantized, and the way back for what is read.

Rows lose a mean that all sealed tokens of a KV head share, and are rotated (`kernels.rotation`):
k' = R (k - m), v' = R (v - n). Queries R q then give scores that all lack q.m, which softmax does
not see but the LSE does, and outputs R (o - n).

A layer's means are one tensor, fp32 [2, H, D]: of keys, and of values.
"""

from __future__ import annotations

import math

import torch

from sglang_diffxkv.kernels.attention_part import AttentionPart
from sglang_diffxkv.kernels.rotation import rotate

LOG2_E = math.log2(math.e)


def to_sealed(rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., H, D] as sealed pages hold them; fp32.

    Args:
        mean: fp32 [H, D].
    """
    return rotate(rows.float() - mean)


def from_sealed(
    part: AttentionPart, q: torch.Tensor, means: torch.Tensor, sm_scale: float
) -> AttentionPart:
    """Attention over sealed rows, as it would be over the model's own.

    Args:
        part: of q [T, Hq, D], rotated, over sealed pages; where it is empty, so is the result.
        q: not rotated.
        means: fp32 [2, H, D], contiguous. sm_scale: factor of q.k.
    """
    group = q.shape[1] // means.shape[1]
    keys, values = means.repeat_interleave(group, 1)
    lacking = (q.float() * keys).sum(-1) * (sm_scale * LOG2_E)
    return AttentionPart(rotate(part.out) + values, part.lse + lacking)
