# SPDX-License-Identifier: Apache-2.0
"""The budget solver against exhaustive search, against XKV's greedy, and on bins of tokens."""

from itertools import product

import pytest
import torch

from sglang_diffxkv.policy.budgeting.budget import (
    Prices,
    Ranking,
    Split,
    least_bytes,
    most_retained,
    rank_bins,
    rank_tokens,
)

INSTANCES = 600
"""Of each of the two limits."""


class Instance:
    """A few weights, and every choice of tiers for them: prices, utilities."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        size = int(torch.randint(1, 8, (), generator=rng))
        weights = torch.rand(size, generator=rng, dtype=torch.float64) ** 3
        if seed % 3 == 0:
            weights = (weights * 4).round() / 4  # ties, and zeros
        self.weights = weights.sort(descending=True).values / weights.sum().clamp(min=1e-9)
        low = int(torch.randint(1, 100, (), generator=rng))
        high = low + int(torch.randint(0, 100, (), generator=rng))
        utility = float(torch.rand((), generator=rng)) * 0.98 + 0.01
        self.prices = Prices(high, low, utility if high > low else 1.0)
        self.forced = int(torch.randint(0, size + 1, (), generator=rng)) if seed % 4 == 0 else 0
        choices = torch.tensor(list(product((0, 1, 2), repeat=size)))
        choices = choices[(choices[:, : self.forced] == 2).all(1)]
        prices = torch.tensor([0, low, high], dtype=torch.float64)
        shares = torch.tensor([0, self.prices.low_utility, 1], dtype=torch.float64)
        self.nbytes = prices[choices].sum(1)
        self.utility = (shares[choices] * self.weights).sum(1)
        self.limit = float(torch.rand((), generator=rng))

    def outcome(self, split: Split) -> tuple[float, float]:
        """Bytes and utility of a split."""
        high, low = int(split.high), int(split.low)
        assert self.forced <= high <= high + low <= len(self.weights)
        nbytes = high * self.prices.high_bytes + low * self.prices.low_bytes
        kept = self.weights[high : high + low].sum()
        return nbytes, float(self.weights[:high].sum() + self.prices.low_utility * kept)


@pytest.mark.parametrize("start", range(0, INSTANCES, 100))
def test_most_retained_is_optimal(start: int) -> None:
    for seed in range(start, start + 100):
        case = Instance(seed)
        limit = case.limit * 1.2 * float(case.nbytes.max())
        split = most_retained(rank_tokens(case.weights), case.prices, limit, case.forced)
        nbytes, utility = case.outcome(split)
        allowed = case.nbytes <= limit
        if not allowed.any():
            assert (int(split.high), int(split.low)) == (case.forced, 0)
            continue
        assert nbytes <= limit
        assert utility == pytest.approx(float(case.utility[allowed].max()), abs=1e-12)


@pytest.mark.parametrize("start", range(0, INSTANCES, 100))
def test_least_bytes_is_optimal(start: int) -> None:
    for seed in range(start, start + 100):
        case = Instance(seed)
        limit = case.limit * float(case.utility.max())
        split = least_bytes(rank_tokens(case.weights), case.prices, limit, case.forced)
        nbytes, utility = case.outcome(split)
        assert utility >= limit - 1e-8
        assert nbytes == float(case.nbytes[case.utility >= limit - 1e-9].min())


def xkv_greedy(scores: torch.Tensor, tokens: int) -> list[int]:
    """Budgets by layer of XKV's released loop: one token at a time to the layer that gains most.

    Args:
        scores: [L, N], of one head per layer (xkv_utils.py, `total_size`).
    """
    scores = scores.sort(-1, descending=True).values / scores.sum(-1, keepdim=True)
    budgets = [0] * len(scores)
    for _ in range(tokens):
        gains = [
            float(row[n]) if n < len(row) else -1.0 for row, n in zip(scores, budgets, strict=True)
        ]
        budgets[max(range(len(gains)), key=gains.__getitem__)] += 1
    return budgets


@pytest.mark.parametrize("seed", range(20))
def test_one_tier_is_xkvs_greedy(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 33, generator=rng, dtype=torch.float64) ** (seed % 5 + 1)
    total = 60
    expected = xkv_greedy(scores, total)
    weights = scores / scores.sum(-1, keepdim=True)
    flat, order = weights.flatten().sort(descending=True)
    one_tier = Prices(100, 100, 1.0)
    split = most_retained(rank_tokens(flat), one_tier, total * 100)
    assert int(split.high + split.low) == total
    assert (order[:total] // 33).bincount(minlength=5).tolist() == expected
    # The other limit: the fewest tokens with that much retention.
    retention = float(flat[:total].sum())
    split = least_bytes(rank_tokens(flat), one_tier, retention)
    assert int(split.high + split.low) == total


@pytest.mark.parametrize("seed", range(10))
def test_bins_agree_with_their_tokens(seed: int) -> None:
    """To within the tokens of a bin or two, of 300 bins."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 20, (300,), generator=rng)
    weights = torch.rand(300, generator=rng, dtype=torch.float64) ** 4
    weights = weights.sort(descending=True).values
    tokens = weights.repeat_interleave(counts)
    weights, tokens = weights / tokens.sum(), tokens / tokens.sum()
    bins, single = rank_bins(weights * counts, counts), rank_tokens(tokens)
    prices = Prices(100, 60, 0.9)
    some_bins = 40 * 60
    for limit in (0.2, 0.5, 0.8, 0.95):
        nbytes = limit * len(tokens) * 100
        found, best = (most_retained(ranking, prices, nbytes) for ranking in (bins, single))
        assert nbytes - 60 < _bytes(found) <= nbytes + 1e-6 or limit > 0.9
        assert _gain(single, found) == pytest.approx(_gain(single, best), abs=0.01)
        found, best = (least_bytes(ranking, prices, limit) for ranking in (bins, single))
        assert _bytes(found) == pytest.approx(_bytes(best), abs=some_bins)
        assert _gain(single, found) == pytest.approx(limit, abs=0.01)


def _bytes(split: Split) -> float:
    return float(split.high * 100 + split.low * 60)


def _gain(ranking: Ranking, split: Split) -> float:
    high, kept = split.high.floor(), (split.high + split.low).floor()
    return float(0.1 * ranking.mass_of(high) + 0.9 * ranking.mass_of(kept))


def test_no_tokens() -> None:
    ranking = rank_tokens(torch.zeros(0))
    for split in (
        most_retained(ranking, Prices(2, 1, 0.5), 10.0),
        least_bytes(ranking, Prices(2, 1, 0.5), 0.0),
    ):
        assert (float(split.high), float(split.low)) == (0, 0)
