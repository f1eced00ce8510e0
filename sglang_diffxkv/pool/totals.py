# SPDX-License-Identifier: Apache-2.0
"""What the store holds, as sums that are kept at each change: nothing is ever counted over."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.transfer import Readback
from sglang_diffxkv.kernels.layout import head_counts
from sglang_diffxkv.policy.quality import Quality


class LayerSums(NamedTuple):
    """Of all sealed pages, by layer.

    Attributes:
        high, low: kept (token, KV head) pairs. frames: frames that this rank has in use.
    """

    high: list[int]
    low: list[int]
    frames: list[int]


class Totals:
    """Sums over pages: what only the device knows on the device, the rest on the host.

    Attributes:
        by_quality: pages in use by `Quality`. by_plan: sealed pages, and those on the host, by the
            number of the plan that was in force when they were sealed.
    """

    def __init__(self, num_layers: int, device: str) -> None:
        self._by_layer = torch.zeros(3, num_layers, dtype=torch.int64, device=device)
        self.by_quality: Counter[Quality] = Counter()
        self.by_plan: Counter[int] = Counter()
        self._seen = Readback(self._by_layer)

    @property
    def nbytes(self) -> int:
        return self._by_layer.nbytes

    @staticmethod
    def bytes_for(num_layers: int) -> int:
        return 3 * 8 * num_layers

    def add_payload(self, heads: torch.Tensor, frames: torch.Tensor, sign: int = 1) -> None:
        """Count payload in, or with ``sign`` -1 out.

        Args:
            heads: int32 [L, N, H, 2], directory records; zeros count nothing.
            frames: int [L, N], frames of each.
        """
        high, low = head_counts(heads)
        sums = torch.stack([high.sum((1, 2)), low.sum((1, 2)), frames.sum(1)])
        self._by_layer.add_(sums, alpha=sign)

    def replace_payload(
        self, layer: int, old: torch.Tensor, new: torch.Tensor, freed: torch.Tensor
    ) -> None:
        """Pages of one layer got other payload.

        Args:
            old, new: int32 [N, H, 2], their records before and now.
            freed: int [N], how many frames fewer they have.
        """
        (old_high, old_low), (high, low) = head_counts(old), head_counts(new)
        gone = torch.stack([(old_high - high).sum(), (old_low - low).sum(), freed.sum()])
        self._by_layer[:, layer] -= gone

    def by_layer(self) -> LayerSums:
        """As they are now; waits for the device."""
        return LayerSums(*self._by_layer.tolist())

    def lately(self) -> LayerSums:
        """As they were when the device was last asked, without waiting for it."""
        return LayerSums(*self._seen.latest().tolist())
