# SPDX-License-Identifier: Apache-2.0
"""Means that sealed keys lack (`kernels.basis.sealed`): set once, before anything is sealed.

Keys lie far from zero in some channels, most of all in models with biases on them, and all in the
same direction: what tells tokens apart is then a small part of the range that codes must cover. Any
tokens of the model show it, so those that are sealed first will do.
"""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.raw_pages import RawPages

SINKS = 4
"""First tokens of a sequence, whose keys are unlike all others."""
LEAST_RATIO = {8: 1.0, 4: 2.0, 2: 2.0}
"""By bits of high keys: how many times longer than what is left a mean must be to be taken out.
It takes sinks, which lie elsewhere, further from zero, and errors of theirs cost most: with 8 bits
they can afford it (``docs/decisions/016``)."""


class KeyMeans:
    """Of all layers and KV heads.

    Attributes:
        by_layer: fp32 [L, H, D]; 0 until they are set, and of heads that are better off without.
            Kernels keep its address.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, device: str) -> None:
        self.by_layer = torch.zeros(num_layers, num_kv_heads, head_dim, device=device)
        self._is_set = torch.zeros((), dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        return self.by_layer.nbytes

    @staticmethod
    def bytes_for(num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        return num_layers * num_kv_heads * head_dim * 4

    @property
    def are_set(self) -> bool:
        """Waits for the device."""
        return bool(self._is_set)

    def set(self, by_layer: torch.Tensor) -> None:
        """Set them to those of an earlier run."""
        self.by_layer.copy_(by_layer)
        self._is_set.fill_(True)

    def keep_zero(self) -> None:
        """Never take a mean out: where scores are capped, what it adds to them is not known."""
        self.set(torch.zeros_like(self.by_layer))

    def learn(
        self,
        raw: RawPages,
        slots: torch.Tensor,
        position: torch.Tensor,
        ready: torch.Tensor | None,
        *,
        key_bits: int,
        at_once: int,
    ) -> None:
        """Set them from the tokens of some raw pages, if they are not set; without a wait.

        Args:
            slots, position: int64 [S], raw pages, and the index of each in its sequence.
            ready: bool [S], which of them count; None: all. Where none does, nothing is set.
            key_bits: of keys of the high tier.
            at_once: pages of a layer that are read at a time.
        """
        token = torch.arange(PAGE_TOKENS, device=slots.device)
        counts = position[:, None] * PAGE_TOKENS + token >= SINKS  # [S, 64]
        if ready is not None:
            counts = counts & ready[:, None]
        total = counts.sum()
        learns = ~self._is_set & (total > 0)
        weight = counts / total.clamp(min=1)
        for mean, keys in zip(self.by_layer, raw.keys, strict=True):
            found, square = torch.zeros_like(mean), torch.zeros_like(mean)
            for part, slot in zip(weight.split(at_once), slots.split(at_once), strict=True):
                # What is no number must spoil nothing for all who come later.
                tokens = keys[slot].float().nan_to_num_(0.0, 0.0, 0.0).flatten(0, 1).flatten(1)
                found += (part.flatten() @ tokens).view_as(mean)
                square += (part.flatten() @ tokens.square_()).view_as(mean)
            length = found.square().sum(-1, keepdim=True)
            rest = square.sum(-1, keepdim=True) - length
            found *= length > LEAST_RATIO[key_bits] ** 2 * rest
            mean.copy_(torch.where(learns, found, mean))
        self._is_set |= learns
