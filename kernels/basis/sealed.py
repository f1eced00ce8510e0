# SPDX-License-Identifier: Apache-2.0
"""The basis in which sealed keys and values are quantized, and the way back for what is read.

Keys lose a mean that all sealed ones of a KV head share, and both are rotated (`basis.rotation`):
k' = R (k - m), v' = R v. Queries R q then give outputs R o, and scores that all lack q.m, which
softmax does not see but the LSE does.
"""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.softmax import Softmax


def to_sealed_keys(keys: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Keys [..., H, D] as sealed pages hold them; fp32.

    Args:
        mean: fp32 [H, D].
    """
    return rotate(keys.float() - mean)


def from_sealed(
    part: AttentionState, q: torch.Tensor, key_mean: torch.Tensor, softmax: Softmax
) -> AttentionState:
    """Attention over sealed rows, as it would be over the model's own.

    Args:
        part: of q [T, Hq, D], rotated, over sealed pages.
        q: not rotated.
        key_mean: fp32 [H, D]. softmax: of the layer.
    """
    mean = key_mean.repeat_interleave(q.shape[1] // len(key_mean), 0)
    lacking = (q.float() * mean).sum(-1) * softmax.log2_scale
    return AttentionState(rotate(part.out), part.lse + lacking)
