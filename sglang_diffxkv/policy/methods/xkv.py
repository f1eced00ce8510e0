# SPDX-License-Identifier: Apache-2.0
"""Policy `xkv`: budgets by layer, in one format (XKV, arXiv 2412.05896), to compare with."""

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.policy.budgeting.budget import Prices, least_bytes, most_retained, rank_tokens
from sglang_diffxkv.policy.budgeting.caps import full_bytes
from sglang_diffxkv.policy.budgeting.plan import page_overhead
from sglang_diffxkv.policy.budgeting.target import Target, TargetSettings, raw_page_bytes
from sglang_diffxkv.policy.methods.prompt import PromptPolicy

TARGET = 0.9
"""A retention that the paper's examples use, where the user sets no target."""


class XKVPolicy(PromptPolicy):
    """Each layer keeps, for every head, as many tokens as the greedy gives it.

    Scores are SnapKV's, of the last queries and pooled, as in the paper; budgets are the request's
    own.
    """

    name = "xkv"
    settings = TargetSettings

    def __init__(self, config: TargetSettings, layout: PageLayout, num_layers: int) -> None:
        super().__init__(config, layout, num_layers)
        self.target = Target.of(TARGET if config.target is None else config.target)
        self._raw_bytes = raw_page_bytes(layout, num_layers)
        self._overhead = num_layers * page_overhead(layout)

    @property
    def expected_share(self) -> float:
        if self.target.compression is None:
            return 0.5
        full = len(self.caps) * full_bytes(self.layout)
        return min(1.0, self._raw_bytes / self.target.compression / full)

    def budgets(self, scores: torch.Tensor, protected: int) -> torch.Tensor:
        layers, heads, tokens = scores.shape
        # One more token for a layer is one more for each of its heads: R_i(n), XKV's gains.
        known = scores.masked_fill(scores.isinf(), 0).double()
        gains = (known / known.sum((1, 2), keepdim=True).clamp(min=1e-30)).sum(1) / layers
        gains[:, :protected].fill_(torch.inf)
        flat, places = gains.flatten().sort(descending=True, stable=True)
        ranking = rank_tokens(flat.masked_fill(flat.isinf(), 0))
        price = heads * self.layout.token_bytes(self.layout.high)
        prices, fixed = Prices(price, price, 1.0), layers * protected
        if self.target.retention is not None:
            split = least_bytes(ranking, prices, self.target.retention, fixed)
        else:
            assert self.target.compression is not None
            allowed = self._raw_bytes / self.target.compression - self._overhead
            split = most_retained(ranking, prices, tokens / PAGE_TOKENS * allowed, fixed)
        chosen = torch.arange(len(flat), device=flat.device) < split.high + split.low
        return places.div(tokens, rounding_mode="floor")[chosen].bincount(minlength=layers)
