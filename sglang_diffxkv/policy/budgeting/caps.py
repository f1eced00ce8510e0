# SPDX-License-Identifier: Apache-2.0
"""Byte caps of (page, layer)s: the least important tokens are demoted, then pruned, until they fit.

Bytes are exact, alignment included: a head's payload size depends on its two token counts only, so
it is looked up in a table made with `PageLayout.sections`. Moving one token changes one entry's
index, hence the bytes after each of a sorted list of moves are a cumulative sum; no loop is needed.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import HIGH, LOW, PAGE_TOKENS, PRUNED, PageLayout
from sglang_diffxkv.policy.settings import ConfigError

_COUNTS = PAGE_TOKENS + 1


def full_bytes(layout: PageLayout) -> int:
    """Bytes of a (page, layer) with every token in the high tier: the whole of `layer_caps`."""
    return layout.num_kv_heads * layout.sections(PAGE_TOKENS, 0).total


def layer_shares(
    layer_caps: float | tuple[float, ...] | None, num_layers: int
) -> tuple[float, ...]:
    """The setting `layer_caps` layer by layer; 1 where it is None.

    Raises:
        ConfigError: it is of another number of layers.
    """
    if isinstance(layer_caps, tuple):
        if len(layer_caps) != num_layers:
            raise ConfigError(
                f"layer_caps has {len(layer_caps)} shares, but the model has {num_layers} layers: "
                "give one number for all layers or one per layer"
            )
        return layer_caps
    return (1.0 if layer_caps is None else layer_caps,) * num_layers


def never_exceeds(layout: PageLayout, cap: int) -> bool:
    """Whether `cap` bytes hold a (page, layer) whatever its tiers, so that `fit` has no work."""
    return layout.num_kv_heads * max(_size_list(layout)) <= cap


def fit(
    tiers: torch.Tensor, scores: torch.Tensor, caps: torch.Tensor, layout: PageLayout
) -> torch.Tensor:
    """Lower tiers of each (page, layer) until its payload takes at most its cap, and no further.

    First high tokens go low, lowest score first, over all heads together; where that is not enough,
    low tokens are pruned, lowest score first. Ties fall on the lower head, then the earlier token.

    Args:
        tiers: uint8 [S, L, H, 64].
        scores: float32 [S, L, H, 64] without NaN; sinks carry inf.
        caps: int64 [L], bytes of a (page, layer).

    Returns:
        uint8 [S, L, H, 64].
    """
    # Both sorts are stable and so agree on the order of a head's tokens.
    orders = _Orders(
        scores.flatten(-2).argsort(dim=-1, stable=True), scores.argsort(dim=-1, stable=True)
    )
    sizes = _size_table(layout, tiers.device)
    tiers = _lower(tiers, orders, caps, sizes, HIGH, LOW)
    return _lower(tiers, orders, caps, sizes, LOW, PRUNED)


class _Orders(NamedTuple):
    """Token indices by ascending score."""

    overall: torch.Tensor
    """int64 [S, L, H * 64]: over all heads of a (page, layer)."""
    by_head: torch.Tensor
    """int64 [S, L, H, 64]: within each head."""


def _lower(
    tiers: torch.Tensor,
    orders: _Orders,
    caps: torch.Tensor,
    sizes: torch.Tensor,
    source: int,
    target: int,
) -> torch.Tensor:
    """Move tokens from tier `source` to the next lower `target`, by score, while over."""
    movable = tiers == source
    n_high, n_low = ((tiers == tier).sum(-1, keepdim=True) for tier in (HIGH, LOW))
    start = sizes[n_high * _COUNTS + n_low].sum((-2, -1))  # [S, L]

    # moves: how many tokens of its head have moved once this one has; 0..64 also where unmovable.
    moves = _unsort(movable.gather(-1, orders.by_head).cumsum(-1), orders.by_head)
    high_step, low_step = (1, -1) if source == HIGH else (0, 1)
    step = high_step * _COUNTS + low_step
    after = n_high * _COUNTS + n_low - moves * step
    change = torch.where(movable, sizes[after] - sizes[after + step * movable], 0)

    change = change.flatten(-2).gather(-1, orders.overall)
    fits_before = start[..., None] + change.cumsum(-1) - change <= caps[:, None]
    # Alignment can make a move cost bytes: what counts is that no earlier state has fitted.
    moved = _unsort(fits_before.cumsum(-1) == 0, orders.overall).unflatten(-1, movable.shape[-2:])
    return tiers.masked_fill(moved & movable, target)


def _unsort(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values).scatter_(-1, order, values)


@lru_cache(maxsize=8)
def _size_list(layout: PageLayout) -> list[int]:
    """Payload bytes of one head at index ``n_high * 65 + n_low``; 0 where they exceed a page."""
    return [
        layout.sections(n_high, n_low).total if n_high + n_low <= PAGE_TOKENS else 0
        for n_high in range(_COUNTS)
        for n_low in range(_COUNTS)
    ]


@lru_cache(maxsize=8)
def _size_table(layout: PageLayout, device: torch.device) -> torch.Tensor:
    return upload(torch.tensor(_size_list(layout)), device)
