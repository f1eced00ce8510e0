# SPDX-License-Identifier: Apache-2.0
"""Every policy through one matrix; caps against PageLayout itself; diffkv against a scalar loop."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from sglang_diffxkv.config import ConfigError, DiffXKVConfig, Tiers
from sglang_diffxkv.kernels.layout import (
    FORMATS,
    HIGH,
    LOW,
    PAGE_TOKENS,
    PRUNED,
    PageLayout,
    TierFormat,
)
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.budgeting import caps
from sglang_diffxkv.policy.registry import POLICIES, policy_class
from sglang_diffxkv.policy.scoring import sample_queries, spread_queries
from tests.support.layouts import layout_of
from tests.support.policies import Shape, config_of, policy_of

PAGES, LAYERS, HEADS = 5, 3, 2
CAPS = [1.0, 0.71, 0.4, 0.07, 0.001, (0.9, 0.3, 0.01)]
CAPPED = [
    (name, share)
    for name, policy in POLICIES.items()
    for share in CAPS
    if policy.can_shrink and (name, share) != ("snapkv", 1.0)
]


def build(
    config: DiffXKVConfig, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16
) -> TierPolicy:
    return policy_of(config, Shape(LAYERS, HEADS, head_dim, dtype))


def make_context(kind: str, seed: int = 0) -> SealContext:
    """Pages 0, 1, ... of one sequence each, with a kind of importance that must do no harm."""
    rng = torch.Generator().manual_seed(seed)
    shape = (PAGES, LAYERS, HEADS, PAGE_TOKENS)
    context = torch.tensor([64, 100, 1000, 5000, 70])
    # Spread over both thresholds, 0.02 / N and 1 / N.
    spread = 10 ** (torch.rand(shape, generator=rng) * 4 - 3)
    spread /= context[:, None, None, None]
    count = torch.randint(0, 3, (PAGES, PAGE_TOKENS), generator=rng).float()
    importance = {
        "spread": spread,
        "zero": torch.zeros(shape),
        "ties": (spread * context.max()).round() / context.max(),
        "nan": torch.where(spread > spread.median(), torch.nan, spread),
        "inf": torch.where(spread > spread.median(), torch.inf, spread),
        "one head": spread * torch.tensor([0.0, 1e6])[:, None],
    }[kind]
    pages = torch.arange(PAGES)
    return SealContext(importance, count, pages, context, pages, torch.zeros_like(pages))


KINDS = ["spread", "zero", "ties", "nan", "inf", "one head"]


def measured_bytes(tiers: torch.Tensor, layout: PageLayout) -> list[list[int]]:
    """Bytes of each (page, layer) straight from `PageLayout.sections`, head by head."""
    return [
        [
            sum(
                layout.sections(int((head == HIGH).sum()), int((head == LOW).sum())).total
                for head in layer
            )
            for layer in page
        ]
        for page in tiers
    ]


def assert_within(policy: TierPolicy, tiers: torch.Tensor) -> None:
    for page in measured_bytes(tiers, policy.layout):
        assert all(used <= cap for used, cap in zip(page, policy.caps, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_grades_every_token_within_its_caps(name: str, kind: str) -> None:
    policy, ctx = build(config_of(name)), make_context(kind)
    tiers = policy.assign(ctx)
    assert tiers.dtype == torch.uint8
    assert tiers.shape == ctx.importance.shape
    assert tiers.max() <= HIGH
    assert (tiers.transpose(1, 3)[policy.is_sink(ctx)] == HIGH).all()
    assert policy.is_sink(ctx).sum() == policy.config.sink
    assert_within(policy, tiers)
    assert torch.equal(tiers, policy.assign(ctx))
    assert policy.prunes or (tiers != PRUNED).all()


@pytest.mark.parametrize("name", POLICIES)
def test_pages_of_different_sequences_are_graded_independently(name: str) -> None:
    shares = (0.3, 0.5, 0.2) if policy_class(name).can_shrink else None
    policy, ctx = build(config_of(name, layer_caps=shares)), make_context("spread")
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = SealContext(*(field[order] for field in ctx))
    assert torch.equal(policy.assign(shuffled), policy.assign(ctx)[order])
    none = SealContext(*(field[:0] for field in ctx))
    assert policy.assign(none).shape == (0, LAYERS, HEADS, PAGE_TOKENS)


@pytest.mark.parametrize("name", POLICIES)
def test_declarations_hold(name: str) -> None:
    policy = build(config_of(name))
    assert policy.name == name
    assert len(policy.caps) == LAYERS
    assert all(0 < cap <= policy.layout.page_bytes for cap in policy.caps)
    assert 0 < policy.expected_fill <= 1
    assert (policy.layout.high, policy.layout.low) == policy.formats(policy.config)
    if not policy.needs_scores:
        ctx = make_context("spread")
        blank = ctx._replace(importance=torch.zeros_like(ctx.importance))
        assert torch.equal(policy.assign(ctx), policy.assign(blank))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("name", "share"), CAPPED)
def test_caps_are_never_exceeded(
    name: str, head_dim: int, share: float | tuple[float, ...], kind: str
) -> None:
    config = DiffXKVConfig(policy=name, layer_caps=share, alpha_low=0.0)
    policy = build(config, head_dim)
    tiers = policy.assign(make_context(kind))
    assert_within(policy, tiers)


@pytest.mark.parametrize("high", FORMATS.values(), ids=str)
def test_fit_is_exact_for_every_pair_of_formats(high: TierFormat) -> None:
    """Against a scalar loop that moves one token at a time and asks PageLayout after each."""
    rng = torch.Generator().manual_seed(1)
    for low in FORMATS.values():
        layout = layout_of(high.name, low.name, head_dim=80, kv_heads=HEADS, itemsize=2)
        tiers = torch.randint(0, 3, (2, LAYERS, HEADS, PAGE_TOKENS), generator=rng).to(torch.uint8)
        worth = torch.randint(0, 9, tiers.shape, generator=rng).float()
        full = caps.full_bytes(layout)
        limits = torch.tensor([full, full // 2, full // 9])
        fitted = caps.fit(tiers, worth, limits, layout)
        for page in range(2):
            for layer in range(LAYERS):
                expected = scalar_fit(
                    tiers[page, layer].clone(), worth[page, layer], int(limits[layer]), layout
                )
                assert torch.equal(fitted[page, layer], expected)


def scalar_fit(
    tiers: torch.Tensor, worth: torch.Tensor, cap: int, layout: PageLayout
) -> torch.Tensor:
    for source, target in ((HIGH, LOW), (LOW, PRUNED)):
        for index in worth.flatten().argsort(stable=True).tolist():
            if measured_bytes(tiers[None, None], layout)[0][0] <= cap:
                return tiers
            if tiers.view(-1)[index] == source:
                tiers.view(-1)[index] = target
    return tiers


def test_caps_take_the_least_important_and_spare_sinks_and_unscored_tokens() -> None:
    config = DiffXKVConfig(policy="diffkv", layer_caps=0.75, alpha_low=0.0, alpha_high=0.0)
    policy, ctx = build(config), make_context("spread")
    ctx = ctx._replace(count=torch.ones(PAGES, PAGE_TOKENS))
    ctx.count[0, -5:] = 0
    tiers = policy.assign(ctx)
    assert (tiers[0, ..., :4] == HIGH).all()
    assert (tiers[0, ..., -5:] == HIGH).all()
    page, weight = tiers[1, 0].flatten(), ctx.importance[1, 0].flatten()
    assert weight[page == HIGH].min() > weight[page == LOW].max()
    assert (page == HIGH).any() and (page == LOW).any() and (page != PRUNED).all()


@pytest.mark.parametrize("alphas", [(1.0, 0.02), (3.0, 0.0), (0.04, 0.04), (1.0, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_diffkv_equals_its_definition(kind: str, alphas: tuple[float, float]) -> None:
    config = DiffXKVConfig(policy="diffkv", alpha_high=alphas[0], alpha_low=alphas[1], sink=7)
    ctx = make_context(kind, seed=3)
    tiers = build(config).assign(ctx)
    importance, counts = ctx.importance.tolist(), ctx.count.tolist()
    # Thresholds in float32, as the policy has them: Python's floats would differ in the last place.
    high_from, low_from = ((alpha * (torch.tensor(1.0) / ctx.context)).tolist() for alpha in alphas)

    def definition(s: int, layer: int, head: int, j: int) -> int:
        w = importance[s][layer][head][j]
        if s * PAGE_TOKENS + j < 7 or counts[s][j] == 0 or w != w or w >= high_from[s]:
            return HIGH
        return LOW if w >= low_from[s] else PRUNED

    expected = [definition(*index) for index in product(*map(range, tiers.shape))]
    assert tiers.flatten().tolist() == expected


def test_lossless_and_uniform_keep_everything_in_one_format() -> None:
    ctx = make_context("zero")
    for name, formats in (("lossless", ("raw", "raw")), ("uniform", ("K4V4", "K4V4"))):
        policy = build(DiffXKVConfig(policy=name, tiers=Tiers(high="K4V4")))
        assert (policy.assign(ctx) == HIGH).all()
        assert (policy.layout.high.name, policy.layout.low.name) == formats
        assert policy.caps == [policy.layout.page_bytes] * LAYERS


def test_streaming_keeps_sinks_only() -> None:
    tiers = build(DiffXKVConfig(policy="streaming", sink=3)).assign(make_context("spread"))
    assert (tiers[0, ..., :3] == HIGH).all()
    assert tiers.sum() == 3 * HIGH * LAYERS * HEADS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DiffXKVConfig(policy="lossless", layer_caps=0.5), "layer_caps below 1"),
        (DiffXKVConfig(policy="uniform", layer_caps=(1.0, 0.9, 1.0)), "layer_caps below 1"),
        (DiffXKVConfig(policy="snapkv"), "'snapkv' needs layer_caps below 1: the share of tokens"),
        (DiffXKVConfig(policy="snapkv", layer_caps=1.0), "needs layer_caps below 1"),
        (DiffXKVConfig(policy="snapkv", layer_caps=(0.5, 1.0, 0.5)), "needs layer_caps below 1"),
        (DiffXKVConfig(policy="snapkv", layer_caps=(0.5, 0.5)), "2 shares, but the model has 3"),
        (DiffXKVConfig(layer_caps=(0.5, 0.5)), "2 shares, but the model has 3 layers"),
        (DiffXKVConfig(policy="difxkv"), "did you mean 'diffxkv'"),
    ],
)
def test_impossible_policies_are_refused_in_one_line(config: DiffXKVConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(config)
    assert "\n" not in str(caught.value)


def test_capped_layers_count_in_the_expected_fill() -> None:
    free, tight = (build(config_of("diffkv", layer_caps=share)) for share in (1.0, 0.25))
    assert free.expected_fill < tight.expected_fill == 1.0
    assert tight.prunes and build(replace(tight.config, alpha_low=0.0)).prunes


@pytest.mark.parametrize("lens", [[1], [64], [65, 1, 0, 1000, 3], [7, 128], []])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_sampled_queries_are_strided_over_each_chunk(lens: list[int], n: int) -> None:
    rows, indptr, offsets = sample_queries(lens, n)
    assert (rows.dtype, indptr.dtype, offsets.dtype) == (torch.int64, torch.int32, torch.int64)
    assert len(indptr) == len(lens) + 1
    assert indptr[-1] == len(rows) == len(offsets)
    for b, length in enumerate(lens):
        mine = slice(int(indptr[b]), int(indptr[b + 1]))
        assert len(offsets[mine]) == min(length, n)
        assert torch.equal(rows[mine], offsets[mine] + sum(lens[:b]))
        if length:
            assert offsets[mine][-1] == length - 1
            gaps = offsets[mine].diff(prepend=torch.tensor([-1]))
            assert gaps.min() >= length // min(length, n)
            assert gaps.max() <= -(-length // min(length, n))
    again = sample_queries(tuple(lens), n)
    assert all(torch.equal(a, b) for a, b in zip(again, (rows, indptr, offsets), strict=True))


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_spread_queries(n: int) -> None:
    """Half from a chunk's end, the others evenly from before; all of a short chunk."""
    lens = [1, 2, n, n + 1, 3 * n + 5, 1000]
    found = spread_queries(lens, n)
    for chunk, length in enumerate(lens):
        begin, end = found.indptr[chunk : chunk + 2].tolist()
        offsets = found.offsets[begin:end].tolist()
        assert len(offsets) == min(n, length) and offsets == sorted(set(offsets))
        assert offsets[-1] == length - 1 and offsets[0] >= 0
        late = min(length, n // 2)
        assert offsets[len(offsets) - late :] == list(range(length - late, length))
        gaps = [b - a for a, b in pairwise([-1, *offsets[: len(offsets) - late]])]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert torch.equal(found.rows[begin:end], found.offsets[begin:end] + sum(lens[:chunk]))
