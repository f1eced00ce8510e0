# SPDX-License-Identifier: Apache-2.0
"""What a tier policy is: it grades every token of the pages that are about to be sealed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import HIGH, LOW, PAGE_TOKENS, PRUNED, PageLayout, TierFormat
from sglang_diffxkv.policy.budgeting.caps import fit, full_bytes, never_exceeds
from sglang_diffxkv.policy.scoring import SampledQueries, sample_queries


class SealContext(NamedTuple):
    """What is known about S pages of L layers and H KV heads when they are sealed."""

    importance: torch.Tensor
    """float32 [S, L, H, 64]: mean attention that the token received from later sampled queries,
    max over the GQA group; 0 where no query has scored the token."""
    count: torch.Tensor
    """float32 [S, 64]: number of queries that scored the token."""
    position: torch.Tensor
    """int64 [S]: index of the page in its sequence, so token j is number ``position * 64 + j``."""
    context: torch.Tensor
    """int64 [S]: length in tokens of the sequence when the page was last scored."""
    sequence: torch.Tensor | None
    """int64 [S]: pages with equal numbers are of one sequence, and may be judged together. None:
    each by itself."""
    quality: torch.Tensor
    """int64 [S]: `Quality` that the page's request asked for."""


_KNOBS = ("target", "plan", "save_plan", "high_layers")

MAX_DEMOTIONS = 2
"""A page that was demoted so often is at its floor, and can only be evicted."""


_TAIL = 0.005
"""Of a (page, layer)'s importance, what its last demotion may prune."""


class DemotionContext(NamedTuple):
    """What is known about S sealed pages of one layer and H KV heads when they are demoted."""

    tiers: torch.Tensor
    """uint8 [S, H, 64]: tier of every token now."""
    layer: int
    """Number of the layer on this rank, from 0."""
    importance: torch.Tensor
    """float32 [S, H, 64]: importance when the page was sealed, to the eighth of an octave; 0 where
    no query had scored the token, and where it was pruned."""
    position: torch.Tensor
    """int64 [S]: index of the page in its sequence."""
    demotions: torch.Tensor
    """int64 [S]: how often the page has been demoted before, below MAX_DEMOTIONS."""


class TierPolicy(ABC):
    """Grades tokens; a subclass writes `grade` and the class attributes, one policy per file.

    Args:
        config: the user's configuration.
        layout: layout made with the formats that `formats` returned.
        num_layers: L, layers of the model on this rank.

    Raises:
        ConfigError: `layer_caps` do not fit the policy or the model.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = False
    """Whether importance is read; where not, nothing has to be scored before sealing."""
    can_shrink: ClassVar[bool] = True
    """Whether tokens may be demoted or pruned to satisfy `layer_caps` below 1."""
    is_lossless: ClassVar[bool] = False
    """Whether what is read from a sealed page is what was written, bit for bit."""
    grades_quality: ClassVar[bool] = False
    """Whether pages are graded by `SealContext.quality`; where not, high and small are refused."""
    knobs: ClassVar[tuple[str, ...]] = ()
    """Fields of the configuration that mean something to this policy and not to every one."""
    streams: ClassVar[bool] = True
    """Whether pages may be judged one by one, as those of chunked prompts and generated text."""
    may_share: ClassVar[bool] = True
    """Whether pages are fit for other requests, not judged by the question of the first alone."""
    can_demote: ClassVar[bool] = False
    """Whether sealed pages may be demoted under memory pressure."""

    key_means: torch.Tensor | None = None
    """float32 [L, H, D] that sealed keys lack (`kernels.basis.sealed`): of an earlier run, or None;
    once there is a page store, its own."""

    def __init__(self, config: DiffXKVConfig, layout: PageLayout, num_layers: int) -> None:
        self.config = config
        self.layout = layout
        self.shares = shares = _shares(config.layer_caps, num_layers)
        """`layer_caps` of each layer, in (0, 1]."""
        if not self.can_shrink and min(shares) < 1:
            raise ConfigError(
                f"policy {self.name!r} keeps every token in full, so it cannot honour layer_caps "
                f"below 1 (got {min(shares):g}): leave layer_caps out or choose policy 'diffxkv'"
            )
        for knob in _KNOBS:
            if knob not in self.knobs and getattr(config, knob) != getattr(DiffXKVConfig(), knob):
                raise ConfigError(
                    f"policy {self.name!r} has no use for {knob!r}: leave it out or choose policy "
                    "'diffxkv'"
                )
        self.caps = [int(share * full_bytes(layout)) for share in shares]
        """Bytes that a (page, layer) may take at most, by layer: kept exactly by `assign`."""

    @classmethod
    def formats(cls, config: DiffXKVConfig) -> tuple[TierFormat, TierFormat]:
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
        return fit(tiers, self._worth(ctx), caps, self.layout)

    def demote(self, ctx: DemotionContext) -> torch.Tensor:
        """Tiers that sealed pages are to have instead, none of them higher: uint8 [S, H, 64].

        At the first demotion high tokens go low; at the second the least important of the low ones
        are pruned, as many as hold half a per cent of the importance of all low tokens of their
        (page, layer), over all heads together; none where the policy does not prune. Sinks stay as
        they are.
        """
        sink = self.is_sink(ctx)[:, None]
        tiers = ctx.tiers.masked_fill((ctx.tiers == HIGH) & ~sink, LOW)
        if not self.prunes:
            return tiers
        again = (ctx.demotions > 0)[:, None, None]
        return tiers.masked_fill(again & _tail((tiers == LOW) & ~sink, ctx), PRUNED)

    def is_sink(self, ctx: SealContext | DemotionContext) -> torch.Tensor:
        """Which tokens are attention sinks, the first of their sequence: bool [S, 64]."""
        number = torch.arange(PAGE_TOKENS, device=ctx.position.device)
        return ctx.position[:, None] * PAGE_TOKENS + number < self.config.sink

    def _worth(self, ctx: SealContext) -> torch.Tensor:
        """Order in which caps take tokens, least first: float32 [S, L, H, 64], never NaN."""
        most = torch.finfo(torch.float32).max
        worth = ctx.importance.nan_to_num(nan=most, posinf=most)
        # Nothing is known against a token that nobody has scored; only sinks matter more.
        worth = worth.masked_fill((ctx.count == 0)[:, None, None], most)
        return worth.masked_fill(self.is_sink(ctx)[:, None, None], torch.inf)


def _tail(mask: torch.Tensor, ctx: DemotionContext) -> torch.Tensor:
    """The least important of each page's tokens in ``mask``, `_TAIL` of theirs: bool [S, H, 64].

    Nothing is known against a token that nobody has scored. Of equal tokens earlier ones go first.
    """
    known = (mask & (ctx.importance > 0)).flatten(1)
    worth = ctx.importance.flatten(1)
    order = worth.masked_fill(~known, torch.inf).argsort(dim=1, stable=True)
    ascending = (worth * known).gather(1, order).cumsum(1)
    taken = known.gather(1, order) & (ascending <= _TAIL * ascending[:, -1:])
    return torch.empty_like(taken).scatter_(1, order, taken).view_as(mask)


def _shares(layer_caps: float | tuple[float, ...] | None, num_layers: int) -> tuple[float, ...]:
    if isinstance(layer_caps, tuple):
        if len(layer_caps) != num_layers:
            raise ConfigError(
                f"layer_caps has {len(layer_caps)} shares, but the model has {num_layers} layers: "
                "give one number for all layers or one per layer"
            )
        return layer_caps
    return (1.0 if layer_caps is None else layer_caps,) * num_layers
