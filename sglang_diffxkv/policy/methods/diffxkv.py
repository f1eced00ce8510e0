# SPDX-License-Identifier: Apache-2.0
"""Policy `diffxkv`: XKV's budgets for layers, DiffKV's tiers for tokens, as one solution.

`docs/policies.md` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import HIGH, LOW, PageLayout, measure
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.budgeting.budget import (
    Ranking,
    Split,
    least_bytes,
    most_retained,
    rank_tokens,
)
from sglang_diffxkv.policy.budgeting.caps import full_bytes
from sglang_diffxkv.policy.budgeting.learner import PlanLearner, PlanSettings, high_layers
from sglang_diffxkv.policy.budgeting.plan import LayerPlans, page_overhead
from sglang_diffxkv.policy.budgeting.target import (
    Target,
    divisors,
    prices_of,
    prior_of,
    raw_page_bytes,
)
from sglang_diffxkv.policy.demotion import DemotionContext
from sglang_diffxkv.policy.methods.sequences import sequences
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.scoring import SampledQueries, spread_queries

TARGET = 0.9998
"""Where the user sets none: about 3x on real weights, at next to no loss."""
PERSONAL_PAGES = 4
"""Pages of one sequence from which on it gets budgets of its own; fewer follow the plan."""
CAP_OVER_PLAN = 2.0
"""Times its budget in the plan that a layer may take of one request's pages."""


class DiffXKVPolicy(TierPolicy):
    """Tokens compete for bytes across layers and heads, by their share of their layer's importance.

    A prompt's pages, sealed together, get the best choice for themselves within `target`: XKV's
    personalised budgets, with DiffKV's two tiers. Pages sealed alone, such as those of generated
    text, are graded by thresholds that were solved for traffic as it has been. Sinks and tokens
    that no query has scored stay high, and an importance of NaN counts as high.
    """

    name = "diffxkv"
    settings = PlanSettings
    needs_scores = True
    prunes = True
    grades_quality = True
    can_demote = True

    def __init__(self, config: PlanSettings, layout: PageLayout, num_layers: int) -> None:
        super().__init__(config, layout, num_layers)
        self.target = TARGET if config.target is None else config.target
        self.learner = PlanLearner(config, self.target, layout, num_layers)
        self.importance = self.learner.importance
        self._prices = prices_of(layout, self.importance is not None)
        self._overhead = num_layers * page_overhead(layout)
        self._raw_bytes = raw_page_bytes(layout, num_layers)
        self._high_layers = list(high_layers(config, num_layers))

    @property
    def expected_share(self) -> float:
        layers = len(self.caps)
        full = layers * full_bytes(self.layout)
        compression = Target.of(self.target).compression
        if compression is not None:
            return min(1.0, self._raw_bytes / compression / full)
        plan = self.learner.plan
        if plan is not None:
            return min(1.0, sum(plan.qualities[Quality.BALANCED].page_bytes) / full)
        return self._prices.low_bytes / self._prices.high_bytes

    @property
    def nbytes(self) -> int:
        model = self.importance
        return self.learner.nbytes + (0 if model is None else model.nbytes)

    @property
    def plan_number(self) -> int:
        plan = self.learner.plan
        return 0 if plan is None else plan.number

    @property
    def key_means(self) -> torch.Tensor | None:
        return self.learner.key_means

    @key_means.setter
    def key_means(self, key_means: torch.Tensor | None) -> None:
        self.learner.key_means = key_means

    def plan_report(self) -> dict[str, Any] | None:
        plan = self.learner.plan
        qualities = {} if plan is None else plan.qualities
        return {
            "number": self.plan_number,
            "target": self.target,
            "unsaved_pages": self.learner.unsaved_pages,
            "qualities": {quality.name.lower(): asdict(x) for quality, x in qualities.items()},
        }

    def sample(self, extend_lens: Sequence[int], n: int) -> SampledQueries:
        return spread_queries(extend_lens, n)

    def observe(self, ctx: SealContext) -> None:
        self.learner.take_over()
        if self.learner.wants_pages():
            importance, _ = self._weigh(ctx)
            wrong = ~ctx.importance.isfinite().all(2).all(1)
            self.learner.observe(importance, ~(self.protected(ctx) | wrong))

    def on_idle(self) -> None:
        self.learner.on_idle()

    def demote(self, ctx: DemotionContext) -> torch.Tensor:
        return ctx.tiers if ctx.layer in self._high_layers else super().demote(ctx)

    def grade(self, ctx: SealContext) -> torch.Tensor:
        importance, protected = self._weigh(ctx)
        importance = importance + prior_of(Target.of(self.target), self.importance is not None)
        plan = self.learner.plan
        tiers = torch.full_like(importance, HIGH, dtype=torch.uint8)
        # All pages at once: those of generated text are many sequences of one page each.
        for quality, planned in () if plan is None else plan.qualities.items():
            asked = (ctx.quality == quality)[:, None, None, None]
            tiers = torch.where(asked, _by_thresholds(importance, planned), tiers)
        tiers.masked_fill_(protected, HIGH)
        for pages in sequences(ctx, least=1 if plan is None else PERSONAL_PAGES):
            quality = Quality(int(ctx.quality[pages[0]]))
            layers = None if plan is None else plan.qualities[quality]
            target = Target.of(self.target).at(quality)
            tiers[pages] = self._personal(importance[pages], protected[pages], target, layers)
        return tiers

    def _weigh(self, ctx: SealContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Importance in units of uniform attention, finite, and which tokens are high anyway.

        Returns:
            float32 and bool [S, L, H, 64].
        """
        importance = ctx.importance * ctx.context[:, None, None, None]
        protected = ~importance.isfinite()
        protected |= self.protected(ctx)[:, None, None]
        for layer in self._high_layers:
            protected[:, layer].fill_(True)
        return importance.masked_fill(~importance.isfinite(), 0), protected

    def _personal(
        self,
        importance: torch.Tensor,
        protected: torch.Tensor,
        target: Target,
        planned: LayerPlans | None,
    ) -> torch.Tensor:
        """The best tiers for P pages of one sequence.

        Args:
            importance, protected: [P, L, H, 64], see `_weigh`.
            planned: caps what a layer may take; None where nothing is known.
        """
        choice = self._choice(importance, protected)
        if target.retention is not None:
            split = least_bytes(choice.ranking, self._prices, target.retention, choice.protected)
            tiers = choice.tiers(split)
        else:
            assert target.compression is not None
            allowed = len(importance) * self._raw_bytes / target.compression
            tiers = self._within(choice, allowed)
        return (
            tiers if planned is None else self._within_plan(tiers, importance, protected, planned)
        )

    def _choice(self, importance: torch.Tensor, protected: torch.Tensor) -> _Choice:
        return _Choice(importance, protected, self.importance is not None)

    def _within(self, choice: _Choice, allowed: float) -> torch.Tensor:
        """Tiers whose frames take as near to ``allowed`` bytes as can be, at the best retention.

        What alignment adds is estimated first, and measured then.
        """
        nbytes: float | torch.Tensor = allowed - choice.pages * self._overhead
        for _ in range(2):
            split = most_retained(choice.ranking, self._prices, nbytes, choice.protected)
            tiers = choice.tiers(split)
            frames = -(-measure(tiers, self.layout).nbytes // self.layout.frame_bytes)
            nbytes = nbytes + allowed - frames.sum() * self.layout.frame_bytes
        return tiers

    def _within_plan(
        self,
        tiers: torch.Tensor,
        importance: torch.Tensor,
        protected: torch.Tensor,
        planned: LayerPlans,
    ) -> torch.Tensor:
        """Grade again the layers that take more than the plan allows them."""
        pages = len(tiers)
        nbytes = (tiers == HIGH).sum((0, 2, 3)) * self._prices.high_bytes
        nbytes = nbytes + (tiers == LOW).sum((0, 2, 3)) * self._prices.low_bytes
        overhead = page_overhead(self.layout)
        caps = [pages * (CAP_OVER_PLAN * budget - overhead) for budget in planned.page_bytes]
        over = nbytes > upload(torch.tensor(caps), tiers.device)
        for layer in self._high_layers:
            over[layer].fill_(False)
        for layer in over.nonzero().flatten().tolist():
            own = slice(layer, layer + 1)
            choice = self._choice(importance[:, own], protected[:, own])
            split = most_retained(choice.ranking, self._prices, caps[layer], choice.protected)
            tiers[:, layer] = choice.tiers(split)[:, 0]
        return tiers


class _Choice:
    """Tokens of P pages of one sequence, in the order in which tiers are given."""

    def __init__(self, importance: torch.Tensor, protected: torch.Tensor, predicted: bool) -> None:
        """Takes [P, L, H, 64] each: importance (float32, finite), and what is high anyway."""
        self.shape = importance.shape
        self.pages = len(importance)
        weight = importance.masked_fill(protected, 0).double()
        by_layer = weight.sum((0, 2, 3), keepdim=True)
        layers = self.shape[1] if predicted else (by_layer > 0).sum().clamp(min=1)
        weight = weight / divisors(by_layer, predicted) / layers
        # Ties fall on the earlier page, the lower layer and head, then the earlier token.
        rank_by = weight.masked_fill(protected, torch.inf).flatten()
        self._order = rank_by.argsort(descending=True, stable=True)
        self.ranking: Ranking = rank_tokens(weight.flatten()[self._order])
        self.protected = protected.sum()

    def tiers(self, split: Split) -> torch.Tensor:
        """uint8 [P, L, H, 64]."""
        place = torch.arange(len(self._order), device=self._order.device)
        code = (place < split.high).to(torch.uint8) + (place < split.high + split.low)
        return torch.empty_like(code).scatter_(0, self._order, code).view(self.shape)


def _by_thresholds(importance: torch.Tensor, planned: LayerPlans) -> torch.Tensor:
    """Tiers of pages by the plan's alphas: uint8 [P, L, H, 64]."""
    high, low = (
        upload(torch.tensor(alphas), importance.device)[:, None, None]
        for alphas in (planned.alpha_high, planned.alpha_low)
    )
    return (importance >= high).to(torch.uint8) + (importance >= low)
