# SPDX-License-Identifier: Apache-2.0
"""Importances of a context's tokens, from the attention of queries that a server cannot ask.

The model reads the context, a request to repeat it, and the context again: the queries of the
second reading stand for all that may be asked of it later (KVzip, arXiv 2505.23416).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.accuracy.real_models.reader import Reader, States
from sglang_diffxkv.policy.budgeting.target import PRIOR
from sglang_diffxkv.policy.scoring import spread_queries

REQUEST = "\n\nRepeat the previous context exactly.\n\n"
SAMPLED = 64
"""Queries that a server samples of a prompt."""
_AT_ONCE = 256
"""Queries."""


class Attention(NamedTuple):
    """Of later queries to each token, in units of uniform attention: fp32 [L, H, n].

    Attributes:
        mean, square: means of it and of its square, the largest of a KV head's query heads.
    """

    mean: torch.Tensor
    square: torch.Tensor


def reread(reader: Reader, ids: torch.Tensor, request: torch.Tensor) -> tuple[States, Attention]:
    """What the model computes for a context, and the attention to it of a second reading.

    Args:
        ids, request: int64 [n] and [m].
    """
    states = reader.prefill(torch.cat([ids, request, ids]))
    n = len(ids)
    again = torch.arange(n) + n + len(request)
    return States(*(side[:, :, :n] for side in states)), attention(states, again, n)


def sampled(states: States) -> Attention:
    """That of the queries which a server samples of this prompt."""
    tokens = states.keys.shape[2]
    return attention(states, spread_queries([tokens], SAMPLED).rows, tokens)


def attention(states: States, rows: torch.Tensor, tokens: int) -> Attention:
    """Of the queries at `rows` (int64 [S]), all of which count for the tokens before them.

    Args:
        tokens: n, the first of which attention is returned.
    """
    layers = zip(states.queries, states.keys, strict=True)
    sums = [_sums(queries[:, rows], keys, rows, tokens) for queries, keys in layers]
    later = (rows[:, None] > torch.arange(tokens)).sum(0).clamp_(min=1)
    return Attention(*(torch.stack(side) / later for side in zip(*sums, strict=True)))


def _sums(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of attention and of its square, [H, n]; of queries [Hq, S, D] to keys [H, N, D]."""
    groups = queries.unflatten(0, (len(keys), -1))
    total = keys.new_zeros(*groups.shape[:2], tokens)
    square = torch.zeros_like(total)
    place, scale = torch.arange(keys.shape[1]), keys.shape[-1] ** -0.5
    for q, at in zip(groups.split(_AT_ONCE, 2), positions.split(_AT_ONCE), strict=True):
        scores = (q @ keys[:, None].mT).mul_(scale)
        weights = scores.masked_fill_(place > at[:, None], -torch.inf).softmax(-1)[..., :tokens]
        weights *= (place[:tokens] < at[:, None]) * (at[:, None] + 1)
        total += weights.sum(-2)
        square += weights.square_().sum(-2)
    return total.amax(1), square.amax(1)


def importances(states: States, again: Attention) -> dict[str, torch.Tensor]:
    """By name, fp32 [L, H, n]; the first is what servers go by, the last the oracle."""
    return {
        f"mean of {SAMPLED} queries + {PRIOR:g}, by layer": by_layer(sampled(states).mean + PRIOR),
        f"rereading's mean + {PRIOR:g}, by layer": by_layer(again.mean + PRIOR),
        "its root mean square, by layer": by_layer(again.square.sqrt()),
        "its mean square, by layer": by_layer(again.square),
        "its mean square": again.square,
    }


def by_layer(importance: torch.Tensor) -> torch.Tensor:
    """In shares of each layer's."""
    return importance / importance.sum((1, 2), keepdim=True)
