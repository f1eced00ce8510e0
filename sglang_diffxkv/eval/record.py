# SPDX-License-Identifier: Apache-2.0
"""What is measured of one variant, and its figures of the pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_diffxkv.eval.variants import FULL
from sglang_diffxkv.kernels.layout import PAGE_TOKENS


@dataclass(frozen=True)
class Record:
    """One variant on one task at one length; `None` stands for what does not apply."""

    policy: str
    target: float | None
    task: str
    length: int
    documents: int
    """That it was measured on: several samples about one are not independent."""
    physical_compression: float
    kept_high: float | None
    """Shares of the (token, KV head, layer) entries of sealed pages."""
    kept_low: float | None
    pruned: float | None
    sealed: float | None
    """Share of the tokens held that is in sealed pages; the others are raw."""
    under_pressure: int
    """Pages that were sealed early for want of memory: figures hold where this is 0."""

    @property
    def is_full(self) -> bool:
        """Whether it is of full KV, which the others are compared with."""
        return self.policy == FULL

    @property
    def label(self) -> str:
        """Name of the variant."""
        return label(self.policy, self.target)


def label(policy: str, target: float | None) -> str:
    """Name of a variant, with the compression that it was made for."""
    return policy if target is None else f"{policy} at {target:g}×"


def pool_figures(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Those fields of a record that are the pool's, all of `stats` taken together."""
    if not stats:
        shares = dict.fromkeys(("kept_high", "kept_low", "pruned", "sealed"))
        return shares | {"physical_compression": 1.0, "under_pressure": 0}
    tiers = {
        tier: sum(stat["tier_tokens"][tier] for stat in stats) for tier in ("high", "low", "pruned")
    }
    entries = max(1, sum(tiers.values()))
    in_use = [stat["bytes_in_use"] for stat in stats]
    dense = [stat["physical_compression"] * n for stat, n in zip(stats, in_use, strict=True)]
    sealed = sum(stat["sealed_pages"] for stat in stats) * PAGE_TOKENS
    return {
        "physical_compression": sum(dense) / sum(in_use),
        "kept_high": tiers["high"] / entries,
        "kept_low": tiers["low"] / entries,
        "pruned": tiers["pruned"] / entries,
        "sealed": sealed / sum(stat["tokens_held"] for stat in stats),
        # Counted since the server's start: any is too many.
        "under_pressure": stats[-1]["counters"]["sealed_under_pressure"],
    }
