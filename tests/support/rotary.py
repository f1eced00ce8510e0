# SPDX-License-Identifier: Apache-2.0
"""RoPE, in the pairs that a model has."""

from __future__ import annotations

import torch

from sglang_diffxkv.policy.importance.features import Rotary


def turned(keys: torch.Tensor, rotary: Rotary, position: float) -> torch.Tensor:
    """Keys [..., D] as they are so many positions further on."""
    out = keys.clone()
    first, second = rotary.pairs(keys)
    pairs = first.shape[-1]
    angle = position / 10000 ** (torch.arange(pairs) / max(1, pairs))
    cos, sin = angle.cos().to(keys.dtype), angle.sin().to(keys.dtype)
    one, other = rotary.pairs(out)
    one.copy_(first * cos - second * sin)
    other.copy_(first * sin + second * cos)
    return out
