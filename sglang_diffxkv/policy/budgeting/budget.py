# SPDX-License-Identifier: Apache-2.0
"""Budget solver: how many tokens to keep, and in which tier, for the least bytes or best retention.

Every (layer, KV head, token) may be dropped, kept low or kept high, for 0, b_low or b_high bytes
and a utility of 0, u·w or w. Its weight w is its share of its layer's importance, so that the
utilities of a layer sum to XKV's retention R_i, and those of all layers to L times the mean R.

XKV (arXiv 2412.05896) adds the token with the largest gain to its layer's budget until one of two
limits is met. All tokens have the same prices here, so swapping two tokens shows that in a best
choice no token weighs less than one of a lower tier: sorted by weight over all layers, the first
``high`` are high and the next ``low`` are low. Only the two counts are open. One sort and prefix
sums give the utility and the bytes of every count, and each limit fixes ``low`` for a given
``high``: the optimum, not an approximation, is found in one vectorised sweep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_ROUNDING = 1e-9
"""Of sums of float64, relative to all utility."""


class Prices(NamedTuple):
    """What the tiers cost and give; `low_bytes` is at most `high_bytes`."""

    high_bytes: float
    low_bytes: float
    low_utility: float
    """u in (0, 1]: of a low token, in shares of what it gives when high."""


class Ranking(NamedTuple):
    """Weights in descending order, as prefix sums; bins of equal weights, or single tokens."""

    tokens: torch.Tensor
    """float64 [M + 1]: tokens of the first bins, from 0 to all."""
    mass: torch.Tensor
    """float64 [M + 1]: sum of their weights."""
    is_single: bool
    """Whether every bin is one token, so that ``tokens`` counts 0, 1, 2, ..."""

    def mass_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sum of the largest ``tokens`` (float64, any shape, 0 to all) weights."""
        if self.is_single:
            return self.mass[tokens.long()]
        bin_ = (torch.searchsorted(self.tokens, tokens, right=True) - 1).clamp(
            max=len(self.tokens) - 2
        )
        width = (self.tokens[bin_ + 1] - self.tokens[bin_]).clamp(min=torch.finfo().tiny)
        into = (tokens - self.tokens[bin_]) / width
        return self.mass[bin_] + into * (self.mass[bin_ + 1] - self.mass[bin_])

    def tokens_for(self, mass: torch.Tensor) -> torch.Tensor:
        """Fewest tokens whose weights sum to ``mass``; all where none do."""
        at = torch.searchsorted(self.mass, mass).clamp(max=len(self.mass) - 1)
        if self.is_single:
            return self.tokens[at]
        before = (at - 1).clamp(min=0)
        height = (self.mass[at] - self.mass[before]).clamp(min=torch.finfo().tiny)
        into = ((mass - self.mass[before]) / height).clamp(0, 1)
        return self.tokens[before] + into * (self.tokens[at] - self.tokens[before])


class Split(NamedTuple):
    """The best choice, as 0-dimensional float64 tensors on the weights' device."""

    high: torch.Tensor
    """How many of the heaviest tokens are high."""
    low: torch.Tensor
    """How many of those after them are low."""


def rank_tokens(weights: torch.Tensor) -> Ranking:
    """Ranking of single tokens.

    Args:
        weights: [N] in descending order, not negative.
    """
    mass = torch.nn.functional.pad(weights.double().cumsum(0), (1, 0))
    return Ranking(torch.arange(len(mass), device=mass.device).double(), mass, is_single=True)


def rank_bins(mass: torch.Tensor, tokens: torch.Tensor) -> Ranking:
    """Ranking of histogram bins.

    Args:
        mass, tokens: [M], sum of the weights and number of the tokens of each bin, by descending
            weight of a token.
    """
    counted, summed = (
        torch.nn.functional.pad(x.double().cumsum(0), (1, 0)) for x in (tokens, mass)
    )
    return Ranking(counted, summed, is_single=False)


def most_retained(
    ranking: Ranking,
    prices: Prices,
    nbytes: float | torch.Tensor,
    protected: int | torch.Tensor = 0,
) -> Split:
    """The greatest utility within ``nbytes``; the first ``protected`` tokens are high in any case.

    Where these alone take more, nothing but them is kept.
    """
    high = ranking.tokens
    rest = nbytes - high * prices.high_bytes
    low = (rest / prices.low_bytes).floor().clamp(min=0).minimum(high[-1] - high)
    allowed = (high >= protected) & ((rest >= 0) | (high <= protected))
    utility = _utility(ranking, prices, low)
    return _best(ranking, low, torch.where(allowed, utility, -torch.inf))


def least_bytes(
    ranking: Ranking, prices: Prices, utility: float, protected: int | torch.Tensor = 0
) -> Split:
    """The fewest bytes whose utility is at least ``utility``, else everything high.

    The first ``protected`` tokens are high in any case.
    """
    high, u = ranking.tokens, prices.low_utility
    # (1 - u) mass(high) + u mass(high + low) >= utility, solved for low.
    missing = (utility - _ROUNDING - (1 - u) * ranking.mass) / u
    low = (ranking.tokens_for(missing) - high).clamp(min=0)
    enough = _utility(ranking, prices, low) >= utility - 2 * _ROUNDING
    allowed = (enough | (high == high[-1])) & (high >= protected)
    nbytes = high * prices.high_bytes + low * prices.low_bytes
    return _best(ranking, low, torch.where(allowed, -nbytes, -torch.inf))


def _utility(ranking: Ranking, prices: Prices, low: torch.Tensor) -> torch.Tensor:
    """Of every count of high tokens with ``low`` (float64 [M + 1]) low ones."""
    u = prices.low_utility
    return (1 - u) * ranking.mass + u * ranking.mass_of(ranking.tokens + low)


def _best(ranking: Ranking, low: torch.Tensor, score: torch.Tensor) -> Split:
    """The choice of the highest score, of equal ones that with most high tokens."""
    at = len(score) - 1 - score.flip(0).argmax()
    return Split(ranking.tokens[at], low[at])
