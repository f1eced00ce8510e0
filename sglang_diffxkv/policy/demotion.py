# SPDX-License-Identifier: Apache-2.0
"""What sealed pages lose under memory pressure, before they are evicted."""

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout import HIGH, LOW, PRUNED

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


def step_down(ctx: DemotionContext, sink: torch.Tensor, *, prunes: bool) -> torch.Tensor:
    """Tiers of pages after one more demotion: uint8 [S, H, 64].

    At the first high tokens go low; at the second the least important of the low ones are pruned,
    as many as hold half a per cent of the importance of all low tokens of their (page, layer), over
    all heads together.

    Args:
        sink: bool [S, 64], tokens that stay as they are.
        prunes: whether tokens may be dropped.
    """
    sink = sink[:, None]
    tiers = ctx.tiers.masked_fill((ctx.tiers == HIGH) & ~sink, LOW)
    if not prunes:
        return tiers
    again = (ctx.demotions > 0)[:, None, None]
    return tiers.masked_fill(again & _tail((tiers == LOW) & ~sink, ctx), PRUNED)


def _tail(mask: torch.Tensor, ctx: DemotionContext) -> torch.Tensor:
    """The least important of each page's tokens in ``mask``, `_TAIL` of theirs: bool [S, H, 64].

    Nothing is known against a token that nobody has scored. Of equal tokens earlier ones go first.
    """
    known = (mask & (ctx.importance > 0)).flatten(1)
    score = ctx.importance.flatten(1)
    order = score.masked_fill(~known, torch.inf).argsort(dim=1, stable=True)
    ascending = (score * known).gather(1, order).cumsum(1)
    taken = known.gather(1, order) & (ascending <= _TAIL * ascending[:, -1:])
    return torch.empty_like(taken).scatter_(1, order, taken).view_as(mask)
