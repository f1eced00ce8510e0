# SPDX-License-Identifier: Apache-2.0
"""Means that sealed rows lack (`kernels.sealed_basis`): set once, before anything is sealed.

Keys lie far from zero in some channels, most of all in models with biases on them, and all in the
same direction: what tells tokens apart is then a small part of the range that codes must cover. Any
tokens of the model show it, so those that are sealed first will do.
"""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.raw_pages import RawPages

SINKS = 4
"""First tokens of a sequence, whose keys and values are unlike all others."""


class SealedMeans:
    """Of all layers and KV heads.

    Attributes:
        by_layer: fp32 [L, 2, H, D], of keys and values; 0 until they are set. Kernels keep its
            address.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, device: str) -> None:
        self.by_layer = torch.zeros(num_layers, 2, num_kv_heads, head_dim, device=device)
        self._is_set = torch.zeros((), dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        return self.by_layer.nbytes

    @staticmethod
    def bytes_for(num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        return num_layers * 2 * num_kv_heads * head_dim * 4

    def set(self, by_layer: torch.Tensor) -> None:
        """Set them to those of an earlier run."""
        self.by_layer.copy_(by_layer)
        self._is_set.fill_(True)

    def learn(
        self,
        raw: RawPages,
        slots: torch.Tensor,
        position: torch.Tensor,
        ready: torch.Tensor | None,
        at_once: int,
    ) -> None:
        """Set them from the tokens of some raw pages, if they are not set; without a wait.

        Args:
            slots, position: int64 [S], raw pages, and the index of each in its sequence.
            ready: bool [S], which of them count; None: all. Where none does, nothing is set.
            at_once: pages of a layer that are read at a time.
        """
        token = torch.arange(PAGE_TOKENS, device=slots.device)
        counts = position[:, None] * PAGE_TOKENS + token >= SINKS  # [S, 64]
        if ready is not None:
            counts = counts & ready[:, None]
        total = counts.sum()
        learns = ~self._is_set & (total > 0)
        weight = counts / total.clamp(min=1)
        for means, *rows in zip(self.by_layer, raw.keys, raw.values, strict=True):
            found = torch.zeros_like(means)
            for part, slot in zip(weight.split(at_once), slots.split(at_once), strict=True):
                for mean, pages in zip(found, rows, strict=True):
                    # What is no number must spoil nothing for all who come later.
                    tokens = pages[slot].float().nan_to_num_(0.0, 0.0, 0.0)
                    tokens = tokens.flatten(0, 1).flatten(1)
                    mean += (part.flatten() @ tokens).view_as(mean)
            means.copy_(torch.where(learns, found, means))
        self._is_set |= learns
