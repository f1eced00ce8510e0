# SPDX-License-Identifier: Apache-2.0
"""The knob `target`: a retention below 1 or a compression above 1; what qualities make of it."""

from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout, TierFormat
from sglang_diffxkv.policy.budgeting.budget import Prices
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.settings import CHECKED, Allowed, PolicySettings

_LOSS = {Quality.HIGH: 1 / 3, Quality.BALANCED: 1.0, Quality.SMALL: 3.0}
"""Times the importance that is given up."""
_BYTES = {Quality.HIGH: 1.5, Quality.BALANCED: 1.0, Quality.SMALL: 2 / 3}
"""Times the bytes."""
_LEAST_RETENTION = 0.5

LOW_UTILITY = {"K2V2": 0.95}
"""Of a token in this format, in shares of one in a better one."""
_OTHER_LOW_UTILITY = 0.995
"""Keeping many tokens coarsely beats keeping few precisely (`docs/decisions/010`)."""
PREDICTED_LOW_UTILITY = {"K2V2": 0.8}
_OTHER_PREDICTED_LOW_UTILITY = 0.98
"""The same where importance is predicted damage (`docs/decisions/018`); two bits do ten times that
of four."""

PRIOR = 0.3
"""Importance of any token, in units of uniform attention, for what later queries may ask that no
sampled one did: without it, tokens in the tail are pruned to make a few others precise."""

_ALLOWED = Allowed(
    "a retention of importance below 1, such as 0.95, or a compression above 1, such as 4, or null"
)


@dataclass(frozen=True, config=CHECKED)
class TargetSettings(PolicySettings):
    """Settings of a policy that solves budgets for a target."""

    target: Annotated[float | None, Field(gt=0), _ALLOWED] = None
    """a retention of importance below 1, such as `0.95`, or a compression of sealed pages above 1,
    such as `4`. `null`: 0.9998 for `diffxkv`, 0.9 for `xkv`; the other policies have knobs of their
    own"""

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target == 1:
            raise ValueError(f"target = 1.0 is not allowed; expected {_ALLOWED.text}")
        return self


class Target(NamedTuple):
    """Either of the two limits of XKV's greedy; the other is None."""

    retention: float | None
    """Mean over layers of the importance that is to survive."""
    compression: float | None
    """Bytes of SGLang's own pool over those of sealed pages, frames and all."""

    @classmethod
    def of(cls, value: float) -> Self:
        return cls(value, None) if value < 1 else cls(None, value)

    def at(self, quality: Quality) -> "Target":
        """What a request of that quality is to get, where the server's target is this one."""
        if self.retention is not None:
            loss = (1 - self.retention) * _LOSS[quality]
            least = min(_LEAST_RETENTION, self.retention)
            return Target(max(least, 1 - loss), None)
        assert self.compression is not None
        return Target(None, max(1.0, self.compression / _BYTES[quality]))


def prior_of(target: Target, predicted: bool) -> float:
    """What every token's importance has added to it.

    `PRIOR` where bytes are the limit (a retention is one of importance as it is measured), unless
    it is predicted, also for what no query has asked.
    """
    return PRIOR if target.compression is not None and not predicted else 0.0


def divisors(by_layer: torch.Tensor, predicted: bool) -> torch.Tensor:
    """What importance is divided by, to be a share: float64, of its sum in each layer (any shape).

    Each layer's own: what attention weighs nobody knows, and XKV has all layers matter alike. Where
    damage is predicted, that of all layers is comparable, and they have one divisor.
    """
    by_layer = by_layer.clamp(min=1e-30)
    return by_layer.mean().expand_as(by_layer) if predicted else by_layer


def prices_of(layout: PageLayout, predicted: bool) -> Prices:
    """Bytes and utilities of a token of one KV head in the layout's tiers."""
    high, low = layout.high, layout.low
    utility = low_utility(high, low, predicted)
    return Prices(layout.token_bytes(high), layout.token_bytes(low), utility)


def low_utility(high: TierFormat, low: TierFormat, predicted: bool) -> float:
    """Utility of a low token, in shares of a high one's."""
    if low == high:
        return 1.0
    if predicted:
        return PREDICTED_LOW_UTILITY.get(low.name, _OTHER_PREDICTED_LOW_UTILITY)
    return LOW_UTILITY.get(low.name, _OTHER_LOW_UTILITY)


def raw_page_bytes(layout: PageLayout, num_layers: int) -> int:
    """Bytes of a page in SGLang's own pool."""
    return 2 * num_layers * PAGE_TOKENS * layout.num_kv_heads * layout.row_bytes(0)
