# SPDX-License-Identifier: Apache-2.0
"""Policy `snapkv` against a scalar definition in float64, over ragged sequences in one call."""

import math
from fractions import Fraction

import pytest
import torch

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.layout import HIGH, PAGE_TOKENS, PRUNED
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.budgeting.caps import never_exceeds
from sglang_diffxkv.policy.scoring import last_queries
from tests.support.policies import Shape, policy_of

LAYERS, HEADS, SINK = 3, 2, 5
SHARES = (0.25, 0.6, 0.001)
# Sequences of 1, 2, 3 and 5 pages, interleaved and out of order; the numbers need not be dense.
SEQUENCE = [7, 2, 7, 0, 9, 7, 2, 7, 9, 7, 9]
POSITION = [4, 1, 0, 3, 2, 2, 0, 1, 0, 3, 1]
PAGES = len(SEQUENCE)


def build(shares: float | tuple[float, ...] = SHARES, sink: int = SINK) -> TierPolicy:
    config = DiffXKVConfig(policy="snapkv", layer_caps=shares, sink=sink)
    return policy_of(config, Shape(LAYERS, HEADS, dtype=torch.bfloat16))


def make_context(most: int = 1000, seed: int = 0) -> SealContext:
    """Whole importances up to `most`, whose window sums are exact in float32, so ties are, too."""
    rng = torch.Generator().manual_seed(seed)
    shape = (PAGES, LAYERS, HEADS, PAGE_TOKENS)
    return SealContext(
        importance=torch.randint(0, most + 1, shape, generator=rng).float(),
        count=torch.ones(PAGES, PAGE_TOKENS),
        position=torch.tensor(POSITION),
        context=torch.full((PAGES,), 400),
        sequence=torch.tensor(SEQUENCE),
        quality=torch.zeros(PAGES, dtype=torch.int64),
    )


def pages_of(sequence: int) -> list[int]:
    """Indices of a sequence's pages, by position."""
    return sorted((i for i in range(PAGES) if SEQUENCE[i] == sequence), key=POSITION.__getitem__)


def definition(ctx: SealContext, shares: tuple[float, ...], sink: int) -> torch.Tensor:
    """Tiers token by token, in Python's numbers: uint8 [S, L, H, 64]."""
    tiers = torch.full(ctx.importance.shape, PRUNED, dtype=torch.uint8)
    for sequence in set(SEQUENCE):
        tokens = [(page, j) for page in pages_of(sequence) for j in range(PAGE_TOKENS)]
        forced = [
            POSITION[page] * PAGE_TOKENS + j < sink or float(ctx.count[page, j]) == 0
            for page, j in tokens
        ]
        for layer in range(LAYERS):
            budget = max(round(Fraction(shares[layer]) * len(tokens)), sum(forced))
            for head in range(HEADS):
                scores = [float(ctx.importance[page, layer, head, j]) for page, j in tokens]
                ranks = sorted(range(len(tokens)), key=lambda t: (-_worth(scores, t, forced[t]), t))
                for t in ranks[:budget]:
                    page, j = tokens[t]
                    tiers[page, layer, head, j] = HIGH
    return tiers


def _worth(scores: list[float], token: int, forced: bool) -> float:
    if forced:
        return math.inf
    if math.isnan(scores[token]):
        return 1e300
    near = scores[max(token - 3, 0) : token + 4]
    return sum(score for score in near if not math.isnan(score)) / 7


@pytest.mark.parametrize("most", [1000, 3, 0])
@pytest.mark.parametrize("unscored", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("nan", [0.0, 0.05])
def test_equals_its_definition(most: int, unscored: float, nan: float) -> None:
    """With few different importances nearly all are tied, with 0 all are."""
    ctx = make_context(most)
    rng = torch.Generator().manual_seed(1)
    ctx.count[torch.rand(ctx.count.shape, generator=rng) < unscored] = 0
    ctx.importance[torch.rand(ctx.importance.shape, generator=rng) < nan] = torch.nan
    policy = build()
    tiers = policy.assign(ctx)
    assert torch.equal(tiers, definition(ctx, SHARES, SINK))
    assert torch.equal(tiers, policy.assign(ctx))


@pytest.mark.parametrize("shares", [SHARES, (0.5, 0.99, 0.1)])
def test_every_head_keeps_its_share_of_each_sequence(shares: tuple[float, ...]) -> None:
    tiers = build(shares, sink=0).assign(make_context())
    for sequence in set(SEQUENCE):
        pages = pages_of(sequence)
        kept = (tiers[pages] == HIGH).sum((0, -1))  # [L, H]
        tokens = len(pages) * PAGE_TOKENS
        assert kept.tolist() == [[round(share * tokens)] * HEADS for share in shares]
    # What the share is of is the sequence, not the page.
    assert len({int(n) for n in (tiers[pages_of(7)] == HIGH).sum((1, 2, 3))}) > 1


def test_sequences_do_not_touch_each_other() -> None:
    policy, ctx = build(), make_context()
    tiers = policy.assign(ctx)
    for sequence in set(SEQUENCE):
        pages = pages_of(sequence)
        alone = SealContext(*(field[pages] for field in ctx))
        assert torch.equal(policy.assign(alone), tiers[pages])


def test_sinks_and_unscored_tokens_count_toward_the_budget() -> None:
    """What is certain is kept, though it may be more than the budget, which then is used up."""
    ctx = make_context()
    ctx.importance[:] = 1000
    first, second = pages_of(2)
    ctx.importance[[first, second], :, :, :30] = 0
    ctx.count[second, :9] = 0
    tiers = build((0.25, 0.6, 0.05)).assign(ctx)
    certain = torch.zeros(2, PAGE_TOKENS, dtype=torch.bool)
    certain[0, :SINK] = certain[1, :9] = True
    kept = tiers[[first, second]].permute(1, 2, 0, 3) == HIGH  # [L, H, 2, 64]
    assert kept[..., certain].all()
    assert kept.sum((-2, -1)).tolist() == [[n] * HEADS for n in (32, 77, 14)]


def test_one_page_may_be_kept_in_full() -> None:
    """Which is why a whole page is promised for each, and no byte cap applies."""
    policy, ctx = build((0.5, 0.5, 0.5), sink=0), make_context()
    first, second = pages_of(2)
    ctx.importance[first], ctx.importance[second] = 0, 1000
    tiers = policy.assign(ctx)
    assert (tiers[second] == HIGH).all() and (tiers[first] == PRUNED).all()
    full = policy.layout.num_kv_heads * policy.layout.sections(PAGE_TOKENS, 0).total
    assert policy.caps == [full] * LAYERS
    assert all(never_exceeds(policy.layout, cap) for cap in policy.caps)


def test_mean_share_sizes_the_pool() -> None:
    assert build(0.25).expected_fill == 0.25
    assert build((0.2, 0.5, 0.8)).expected_fill == pytest.approx(0.5)


def test_keeps_16_bit() -> None:
    policy = build()
    assert policy.layout.high.is_raw and policy.layout.low.is_raw


@pytest.mark.parametrize("lens", [[1], [64], [65, 1, 0, 1000, 3], [7, 128], [0], []])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_last_queries_are_the_end_of_each_chunk(lens: list[int], n: int) -> None:
    rows: list[int] = []
    offsets: list[int] = []
    indptr = [0]
    for b, length in enumerate(lens):
        mine = list(range(length))[-n:]
        offsets += mine
        rows += [sum(lens[:b]) + offset for offset in mine]
        indptr.append(len(rows))
    got = last_queries(lens, n)
    assert (got.rows.dtype, got.indptr.dtype, got.offsets.dtype) == (
        torch.int64,
        torch.int32,
        torch.int64,
    )
    assert [field.tolist() for field in got] == [rows, indptr, offsets]
    again = last_queries(tuple(lens), n)
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))
    sampled = build().sample(lens, n)
    assert all(torch.equal(a, b) for a, b in zip(sampled, got, strict=True))
