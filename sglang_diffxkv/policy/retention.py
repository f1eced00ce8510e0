# SPDX-License-Identifier: Apache-2.0
"""Measured retention R: how much importance sealing has kept and demotion then taken, by layer."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.gpu.transfer import Readback
from sglang_diffxkv.kernels.layout import HIGH, LOW
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.budgeting.target import low_utility
from sglang_diffxkv.policy.demotion import DemotionContext


class RetentionMeter:
    """R by layer of all that was sealed (XKV's R_i, arXiv 2412.05896).

    Counts tokens whose importance is known, sinks left out: these are kept in any case, and take so
    much of all attention that R would say little about the others. A low token keeps the utility
    that the budget solver reckons with.

    What demotion takes of it is counted beside that: R as it is sealed stays what the target asks
    for.
    """

    def __init__(self, policy: TierPolicy, num_layers: int, device: str) -> None:
        self._policy = policy
        self._low_utility = low_utility(
            policy.layout.high, policy.layout.low, policy.importance is not None
        )
        self._sums = torch.zeros(3, num_layers, dtype=torch.float64, device=device)
        """Of importances that sealing kept, of all, and of those that demotion took, in units of
        uniform attention, in which sequences of all lengths are comparable."""
        self._seen = Readback(self._sums)

    @property
    def nbytes(self) -> int:
        return self._sums.nbytes

    def add(self, ctx: SealContext, tiers: torch.Tensor) -> None:
        """Take in S pages that are sealed with ``tiers`` (uint8 [S, L, H, 64])."""
        known = ~self._policy.is_sink(ctx) & (ctx.count > 0)
        weight = ctx.importance.masked_fill(~ctx.importance.isfinite(), 0)
        weight = weight * (known * ctx.context[:, None])[:, None, None]
        self._sums[0] += (weight * self._utility(tiers)).sum((0, 2, 3))
        self._sums[1] += weight.sum((0, 2, 3))

    def demote(self, ctx: DemotionContext, tiers: torch.Tensor, context: torch.Tensor) -> None:
        """Note that S sealed pages of one layer now have ``tiers``; waits for nothing.

        Importances are those of `DemotionContext`, to the eighth of an octave.

        Args:
            tiers: uint8 [S, H, 64].
            context: int [S], length of the sequence when the page was sealed.
        """
        weight = ctx.importance * context[:, None, None]
        weight = weight * ~self._policy.is_sink(ctx)[:, None]
        taken = self._utility(ctx.tiers) - self._utility(tiers)
        self._sums[2, ctx.layer] += (weight * taken).sum()

    def lately(self) -> dict[str, float]:
        """Importances of all layers, in units of uniform attention, without waiting for the device:
        of what was sealed, what sealing kept of that, and what demotion has since taken."""
        kept, whole, taken = self._seen.latest().sum(1).tolist()
        return {"sealed": whole, "kept": kept, "demoted": taken}

    def by_layer(self) -> list[float | None]:
        """R of each layer, as it was sealed; None where nothing is known."""
        return [kept / whole if whole else None for kept, whole, _ in self._sums.T.tolist()]

    def demoted_by_layer(self) -> list[float | None]:
        """What demotion has taken of each layer's R since; None where nothing is known."""
        return [taken / whole if whole else None for _, whole, taken in self._sums.T.tolist()]

    def _utility(self, tiers: torch.Tensor) -> torch.Tensor:
        return (tiers == HIGH) + (tiers == LOW) * self._low_utility
