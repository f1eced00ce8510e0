# SPDX-License-Identifier: Apache-2.0
"""What a tier policy is: it grades every token of the pages that are about to be sealed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout, TierFormat
from sglang_diffxkv.policy.budgeting.caps import fit, full_bytes, layer_shares, never_exceeds
from sglang_diffxkv.policy.demotion import DemotionContext, step_down
from sglang_diffxkv.policy.importance.model import ImportanceModel
from sglang_diffxkv.policy.scoring import SampledQueries, sample_queries
from sglang_diffxkv.policy.settings import ConfigError, PolicySettings

SEEN = 10.0
"""Times what sampled queries have seen of a token's importance, beside what is predicted: they see
the mean of its attention, of which the mean square is more than the square. Chosen on documents
that nothing is measured on (`docs/decisions/018`)."""


class SealContext(NamedTuple):
    """What is known about S pages of L layers and H KV heads when they are sealed."""

    importance: torch.Tensor
    """float32 [S, L, H, 64]: mean attention that the token received from later sampled queries,
    max over the GQA group; 0 where no query has scored the token. Where the policy predicts: the
    mean square of the attention that it will get (`with_prediction`)."""
    count: torch.Tensor
    """float32 [S, 64]: number of queries that scored the token; at least 1 of predicted ones."""
    position: torch.Tensor
    """int64 [S]: index of the page in its sequence, so token j is number ``position * 64 + j``."""
    context: torch.Tensor
    """int64 [S]: length in tokens of the sequence when the page was last scored."""
    sequence: torch.Tensor | None
    """int64 [S]: pages with equal numbers are of one sequence, and may be judged together. None:
    each by itself."""
    quality: torch.Tensor
    """int64 [S]: `Quality` that the page's request asked for."""

    def with_prediction(self, predicted: torch.Tensor) -> SealContext:
        """With importances that go by what is predicted, and by what has been seen.

        Args:
            predicted: float32 [S, L, H, 64], `ImportanceModel.predict`.
        """
        context = self.context.clamp(min=1)[:, None, None, None]
        seen = self.importance.square() * SEEN
        return self._replace(importance=predicted / context + seen, count=self.count.clamp(min=1))


class TierPolicy(ABC):
    """Grades tokens; a subclass writes `grade` and the class attributes, one policy per file.

    Args:
        config: the user's settings, those in `settings` at least.
        layout: layout made with the formats that `formats` returned.
        num_layers: L, layers of the model on this rank.

    Raises:
        ConfigError: `layer_caps` do not fit the policy or the model.
    """

    name: ClassVar[str]
    settings: ClassVar[type[PolicySettings]] = PolicySettings
    """What the policy reads of the configuration, which is made of these and of their extensions:
    `target`, say, means something to a policy with `TargetSettings`, and is refused by others."""
    needs_scores: ClassVar[bool] = False
    """Whether importance is read; where not, nothing has to be scored before sealing."""
    can_shrink: ClassVar[bool] = True
    """Whether tokens may be demoted or pruned to satisfy `layer_caps` below 1."""
    is_lossless: ClassVar[bool] = False
    """Whether what is read from a sealed page is what was written, bit for bit."""
    grades_quality: ClassVar[bool] = False
    """Whether pages are graded by `SealContext.quality`; where not, high and small are refused."""
    streams: ClassVar[bool] = True
    """Whether pages may be judged one by one, as those of chunked prompts and generated text."""
    may_share: ClassVar[bool] = True
    """Whether pages are fit for other requests, not judged by the question of the first alone."""
    can_demote: ClassVar[bool] = False
    """Whether sealed pages may be demoted under memory pressure."""

    config: PolicySettings
    importance: ImportanceModel | None = None
    """Predicts importance; None: it is what sampled queries pay attention to."""
    key_means: torch.Tensor | None = None
    """float32 [L, H, D] that sealed keys lack (`kernels.basis.sealed`): of an earlier run, or None;
    once there is a page store, its own."""

    def __init__(self, config: PolicySettings, layout: PageLayout, num_layers: int) -> None:
        self.config = config
        self.layout = layout
        self.shares = layer_shares(config.layer_caps, num_layers)
        """`layer_caps` of each layer, in (0, 1]."""
        if not self.can_shrink and min(self.shares) < 1:
            raise ConfigError(
                f"policy {self.name!r} keeps every token in full, so it cannot honour layer_caps "
                f"below 1 (got {min(self.shares):g}): leave layer_caps out or choose a policy that "
                "drops tokens"
            )
        self.caps = [int(share * full_bytes(layout)) for share in self.shares]
        """Bytes that a (page, layer) may take at most, by layer: kept exactly by `assign`."""

    @classmethod
    def formats(cls, config: PolicySettings) -> tuple[TierFormat, TierFormat]:
        """Formats of the high and the low tier to build the layout with."""
        return config.tiers.formats

    def sample(self, extend_lens: Sequence[int], n: int) -> SampledQueries:
        """Which queries of a prefill step score the tokens before them, up to `n` of a chunk."""
        return sample_queries(extend_lens, n)

    @property
    def prunes(self) -> bool:
        """Whether tokens may be dropped altogether."""
        return min(self.caps) < full_bytes(self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of its own."""
        return 0

    @property
    def plan_number(self) -> int:
        """Number of the plan that pages are sealed under; 0 where there is none."""
        return 0

    def plan_report(self) -> dict[str, Any] | None:
        """The plan in force, as the statistics show it."""
        return None

    def observe(self, ctx: SealContext) -> None:  # noqa: B027
        """Learn from pages that are about to be sealed."""

    def on_idle(self) -> None:  # noqa: B027
        """Nothing runs: begin what has waited for that, in a thread of its own where it takes long.

        The next request may be here already.
        """

    @property
    def expected_fill(self) -> float:
        """Share of its caps that a sealed page is expected to take, in (0, 1]: sizes the pool."""
        expected = self.expected_share * full_bytes(self.layout)
        return sum(min(cap, expected) for cap in self.caps) / sum(self.caps)

    @property
    @abstractmethod
    def expected_share(self) -> float:
        """Expected bytes of a sealed page without caps, in shares of an all-high one: (0, 1]."""

    @abstractmethod
    def grade(self, ctx: SealContext) -> torch.Tensor:
        """Tiers that the policy wants, byte caps aside: uint8 [S, L, H, 64]."""

    def assign(self, ctx: SealContext) -> torch.Tensor:
        """Tier code (PRUNED, LOW, HIGH) of every token, within the caps: uint8 [S, L, H, 64]."""
        tiers = self.grade(ctx)
        if all(never_exceeds(self.layout, cap) for cap in self.caps):
            return tiers
        caps = upload(torch.tensor(self.caps), tiers.device)
        return fit(tiers, self._scores(ctx), caps, self.layout)

    def demote(self, ctx: DemotionContext) -> torch.Tensor:
        """Tiers that sealed pages are to have instead, none of them higher: uint8 [S, H, 64]."""
        return step_down(ctx, self.is_sink(ctx), prunes=self.prunes)

    def is_sink(self, ctx: SealContext | DemotionContext) -> torch.Tensor:
        """Which tokens are attention sinks, the first of their sequence: bool [S, 64]."""
        number = torch.arange(PAGE_TOKENS, device=ctx.position.device)
        return ctx.position[:, None] * PAGE_TOKENS + number < self.config.sink

    def protected(self, ctx: SealContext) -> torch.Tensor:
        """Which tokens stay whatever their importance: bool [S, 64].

        Sinks, and those that no query has scored: nothing is known against them.
        """
        return self.is_sink(ctx) | (ctx.count == 0)

    def _scores(self, ctx: SealContext) -> torch.Tensor:
        """Order in which caps take tokens, least first: float32 [S, L, H, 64], never NaN."""
        most = torch.finfo(torch.float32).max
        scores = ctx.importance.nan_to_num(nan=most, posinf=most)
        # Nothing is known against a token that nobody has scored; only sinks matter more.
        scores = scores.masked_fill((ctx.count == 0)[:, None, None], most)
        return scores.masked_fill(self.is_sink(ctx)[:, None, None], torch.inf)
