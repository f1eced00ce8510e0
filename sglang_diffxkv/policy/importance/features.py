# SPDX-License-Identifier: Apache-2.0
"""What importance is predicted from: a token's own key and value in one KV head.

Keys reach us rotated by their positions (RoPE), which turns pairs of elements and leaves the length
of each pair as it was. So pairs count by their length, and a model that has learnt from short texts
knows the keys of long ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LEAST_ENERGY = 1e-6


@dataclass(frozen=True)
class Rotary:
    """Which elements of a key RoPE turns: of the first `dims`, an even number or 0, pairs of ``i``
    and ``i + dims / 2``, or of neighbours where it is interleaved."""

    dims: int
    interleaved: bool = False

    def pairs(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both elements of each pair: [..., dims / 2] of keys [..., D]."""
        turned = keys[..., : self.dims]
        if self.interleaved:
            return turned[..., ::2], turned[..., 1::2]
        return turned[..., : self.dims // 2], turned[..., self.dims // 2 :]


def feature_count(head_dim: int, rotary: Rotary) -> int:
    """F, how many `features` there are."""
    return 2 * head_dim - rotary.dims // 2


def features(keys: torch.Tensor, values: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """fp32 [..., F]: log energy of each rotary pair, the other elements of the key, the value.

    Args:
        keys: [..., D], after RoPE. values: [..., D].
    """
    keys, values = keys.float(), values.float()
    first, second = rotary.pairs(keys)
    energy = (first.square() + second.square()).clamp(min=_LEAST_ENERGY).log()
    return torch.cat([energy, keys[..., rotary.dims :], values], -1)
