# SPDX-License-Identifier: Apache-2.0
"""Policies `diffxkv` and `xkv`: targets met, budgets that differ, plans, qualities, ties."""

import math
from itertools import pairwise

import pytest
import torch

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.layout import HIGH, LOW, PAGE_TOKENS, PRUNED, measure
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.budgeting.learner import FIRST_PLAN_PAGES
from sglang_diffxkv.policy.budgeting.target import Target, prior_of, raw_page_bytes
from sglang_diffxkv.policy.demotion import DemotionContext
from sglang_diffxkv.policy.methods.diffxkv import PERSONAL_PAGES, DiffXKVPolicy
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.retention import RetentionMeter
from tests.support.contexts import PAGES, SHAPE, context
from tests.support.policies import policy_of

LAYERS, HEADS, _, _ = SHAPE


def build(policy: str = "diffxkv", **fields: object) -> TierPolicy:
    return policy_of(DiffXKVConfig(policy=policy, **fields), SHAPE)  # type: ignore[arg-type]


def retained(policy: TierPolicy, ctx: SealContext, tiers: torch.Tensor) -> float:
    """Mean R over layers, as users see it."""
    meter = RetentionMeter(policy, LAYERS, "cpu")
    meter.add(ctx, tiers)
    found = [r for r in meter.by_layer() if r is not None]
    assert len(found) == LAYERS
    return sum(found) / LAYERS


def compression(policy: TierPolicy, tiers: torch.Tensor) -> float:
    frames = -(-measure(tiers, policy.layout).nbytes // policy.layout.frame_bytes)
    taken = int(frames.sum()) * policy.layout.frame_bytes
    return len(tiers) * raw_page_bytes(policy.layout, LAYERS) / taken


@pytest.mark.parametrize("policy", ["diffxkv", "xkv"])
@pytest.mark.parametrize("target", [0.95, 0.9, 0.8])
@pytest.mark.parametrize("sharp", [0.5, 2.0, 6.0])
def test_retention_target_is_met(policy: str, target: float, sharp: float) -> None:
    graded, ctx = build(policy, target=target), context(sharp=sharp)
    found = retained(graded, ctx, graded.assign(ctx))
    # xkv drops the least token of every head of a layer at once.
    assert target - (1e-6 if policy == "diffxkv" else 0.01) <= found <= target + 0.01


@pytest.mark.parametrize("policy", ["diffxkv", "xkv"])
@pytest.mark.parametrize("target", [2.6, 4.0, 8.0])
@pytest.mark.parametrize("pages", [1, 2, 30])
def test_compression_target_is_met(policy: str, target: float, pages: int) -> None:
    graded, ctx = build(policy, target=target), context(pages)
    assert compression(graded, graded.assign(ctx)) == pytest.approx(
        target, rel=0.02 if pages > 2 else 0.15
    )


def test_layers_get_what_they_need() -> None:
    graded, ctx = build(target=0.9), context()
    kept = (graded.assign(ctx) != PRUNED).sum((0, 2, 3)).tolist()
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 1.5 * kept[-1]


@pytest.mark.parametrize("target", [3.5, 6.0, 0.9])
def test_no_better_choice_nearby(target: float) -> None:
    """Swapping any two tokens of different tiers can only lose retention."""
    graded, ctx = build(target=target), context()
    tiers = graded.assign(ctx)
    worth = ctx.importance * ctx.context[:, None, None, None] + prior_of(Target.of(target), False)
    share = worth / worth.sum((0, 2, 3), keepdim=True)
    sinks = graded.is_sink(ctx)[:, None, None].expand_as(tiers)
    by_tier = [share[(tiers == tier) & ~sinks] for tier in (HIGH, LOW, PRUNED)]
    found = [shares for shares in by_tier if shares.numel()]
    assert len(found) >= 2
    for better, worse in pairwise(found):
        # The sinks' share counts for their layer in neither.
        assert better.min() * 1.05 >= worse.max()


def test_qualities_are_ordered() -> None:
    for target in (0.9, 4.0):
        graded = build(target=target)
        found = [
            retained(graded, ctx, graded.assign(ctx))
            for ctx in (context(quality=q) for q in (Quality.SMALL, Quality.BALANCED, Quality.HIGH))
        ]
        assert found == sorted(found) and found[0] < found[1] < found[2]


def test_lone_pages_follow_the_plan_and_others_their_own_scores() -> None:
    graded = build(target=0.9, learn_share=1.0)
    assert isinstance(graded, DiffXKVPolicy)
    for seed in range(FIRST_PLAN_PAGES // PAGES + 1):
        graded.observe(context(seed=seed))
    graded.learner.wait()
    assert graded.plan_number == 1
    alone = [context(1, seed=seed) for seed in range(100, 140)]
    kept = [retained(graded, ctx, graded.assign(ctx)) for ctx in alone]
    assert sum(kept) / len(kept) == pytest.approx(0.9, abs=0.02)
    assert len({round(r, 3) for r in kept}) > 20  # thresholds, not a share of each page
    unimportant = context(1, seed=7)
    unimportant = unimportant._replace(importance=unimportant.importance / 1000)
    tiers = graded.assign(unimportant)
    assert (tiers[..., 4:] == PRUNED).all() and (tiers[..., :4] == HIGH).all()
    many = context(PERSONAL_PAGES, seed=7)
    many = many._replace(importance=many.importance / 1000)
    assert retained(graded, many, graded.assign(many)) == pytest.approx(0.9, abs=0.01)


def test_plan_caps_what_one_request_may_take() -> None:
    graded = build(target=0.9, learn_share=1.0)
    assert isinstance(graded, DiffXKVPolicy)
    graded.observe(context(FIRST_PLAN_PAGES, sharp=30.0))
    graded.learner.wait()
    plan = graded.learner.plan
    assert plan is not None
    flat = context(sharp=0.01)
    tiers = graded.assign(flat)
    payload = (tiers == HIGH) * graded.layout.token_bytes(graded.layout.high)
    payload = payload + (tiers == LOW) * graded.layout.token_bytes(graded.layout.low)
    for layer, budget in enumerate(plan.qualities[Quality.BALANCED].page_bytes):
        assert int(payload[:, layer].sum()) <= PAGES * 2 * budget
    assert retained(graded, flat, tiers) < 0.8


def test_wrong_numbers_do_no_harm() -> None:
    ctx = context()
    wrong = ctx.importance.clone()
    wrong[0, 1, 0, 10], wrong[1, 2, 1, 20] = math.nan, math.inf
    wrong[2, 3] = 0
    for policy in ("diffxkv", "xkv"):
        for target in (0.9, 6.0):
            graded = build(policy, target=target, learn_share=1.0)
            ctx = ctx._replace(importance=wrong)
            graded.observe(ctx)
            tiers = graded.assign(ctx)
            assert tiers[0, 1, 0, 10] == tiers[1, 2, 1, 20] == HIGH
            zero = graded.assign(ctx._replace(importance=torch.zeros_like(wrong)))
            assert (zero[0, ..., :4] == HIGH).all()


def test_traffic_without_scores_prunes_nothing() -> None:
    graded = build(target=0.9, learn_share=1.0)
    assert isinstance(graded, DiffXKVPolicy)
    ctx = context(FIRST_PLAN_PAGES)
    graded.observe(ctx._replace(importance=torch.full_like(ctx.importance, math.nan)))
    graded.learner.wait()
    assert (graded.assign(context(1)) == HIGH).all()


def test_a_page_is_graded_by_the_plan_that_it_records() -> None:
    graded = build(target=0.9, learn_share=1.0)
    assert isinstance(graded, DiffXKVPolicy)
    graded.observe(context(FIRST_PLAN_PAGES))
    assert graded.learner._solving is not None
    graded.learner._solving.result()
    graded.assign(context(1))
    assert graded.plan_number == 0
    graded.observe(context(1))
    assert graded.plan_number == 1


def test_high_layers_are_not_demoted() -> None:
    graded = build(high_layers=(1,))
    tiers = torch.full((2, HEADS, 64), HIGH, dtype=torch.uint8)
    ctx = DemotionContext(
        tiers, 1, torch.ones(2, HEADS, 64), torch.tensor([3, 4]), torch.zeros(2, dtype=torch.int64)
    )
    assert torch.equal(graded.demote(ctx), tiers)
    assert (graded.demote(ctx._replace(layer=2)) == LOW).all()


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ("diffkv", {"target": 4.0}),
        ("uniform", {"plan": "x"}),
        ("xkv", {"high_layers": (0,)}),
        ("streaming", {"save_plan": "x"}),
    ],
)
def test_settings_that_a_policy_has_no_use_for_are_refused(policy: str, field: dict) -> None:
    with pytest.raises(ConfigError, match=f"{policy!r} has no use for '{next(iter(field))}'"):
        build(policy, **field)


def test_high_layers_stay_high() -> None:
    graded, ctx = build(target=5.0, high_layers=(0, -1)), context()
    tiers = graded.assign(ctx)
    assert (tiers[:, [0, -1]] == HIGH).all()
    assert (tiers[:, 1] != HIGH).any()
    with pytest.raises(ConfigError, match="high_layers has 5, but the model has 5 layers"):
        build(high_layers=(5,))


def test_pages_record_nothing_without_a_plan() -> None:
    graded = build()
    report = graded.plan_report()
    assert report is not None and (report["number"], report["qualities"]) == (0, {})
    assert build("xkv").plan_number == 0 and build("xkv").plan_report() is None


@pytest.mark.parametrize("target", [4.0, 6.0])
def test_lone_pages_take_the_bytes_that_the_plan_was_solved_for(target: float) -> None:
    graded = build(target=target, learn_share=1.0)
    assert isinstance(graded, DiffXKVPolicy)
    for seed in range(FIRST_PLAN_PAGES // PAGES + 1):
        graded.observe(context(seed=seed))
    graded.learner.wait()
    assert graded.plan_number == 1
    taken = [
        int(measure(graded.assign(context(1, seed=seed)), graded.layout).nbytes.sum())
        for seed in range(100, 140)
    ]
    asked = raw_page_bytes(graded.layout, LAYERS) / target
    assert sum(taken) / len(taken) == pytest.approx(asked, rel=0.06)


def test_where_bytes_are_the_limit_the_tail_is_not_pruned_for_precision() -> None:
    """What no sampled query looked at, a later one may: all tokens coarse before some precise."""
    layout = build().layout
    all_low = LAYERS * HEADS * PAGE_TOKENS * layout.token_bytes(layout.low)
    graded = build(target=0.9 * raw_page_bytes(layout, LAYERS) / all_low)
    tiers = graded.assign(context())
    assert (tiers == HIGH).any()
    assert (tiers == PRUNED).float().mean() < 0.01
