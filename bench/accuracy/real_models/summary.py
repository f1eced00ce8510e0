# SPDX-License-Identifier: Apache-2.0
"""Figures of one method over all documents, with intervals over documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.accuracy.real_models.protocol import WINDOW, Answer
from bench.accuracy.real_models.results import Results, Row

RESAMPLES = 2000


class Interval(NamedTuple):
    """A figure with its 95 % interval (bootstrap over documents)."""

    value: float
    low: float
    high: float


class Summary(NamedTuple):
    """Of one method.

    Attributes:
        compression: of the compressed tokens: 16-bit bytes over the method's, all documents
            together. with_window: the same with the raw window on both sides.
        kl, p99_kl: nats. perplexity: of the documents' own tokens.
    """

    row: Row
    compression: float
    with_window: float
    kl: Interval
    p99_kl: Interval
    perplexity: Interval
    agreement: Interval


def summarize(results: Results, row: Row) -> Summary:
    dense = results.token_bytes * sum(results.tokens[name] for name in row.answers)
    nbytes = sum(answer.nbytes for answer in row.answers.values())
    window = results.token_bytes * WINDOW * len(row.answers)
    return Summary(
        row,
        dense / nbytes,
        (dense + window) / (nbytes + window),
        _mean(row, lambda answer: answer.kl),
        _mean(row, lambda answer: answer.p99_kl),
        Interval(*(math.exp(x) for x in _mean(row, lambda answer: answer.nll))),
        _mean(row, lambda answer: answer.agreement),
    )


def ratio(row: Row, to: Row) -> Interval:
    """How many times the mean KL of `to` that of `row` is, over the documents of both."""
    names = [name for name in row.answers if name in to.answers]
    kl = torch.tensor([[r.answers[name].kl for name in names] for r in (row, to)])
    means = kl[:, _resamples(len(names))].mean(-1)
    return _interval(float(kl[0].mean() / kl[1].mean()), means[0] / means[1])


def _mean(row: Row, figure: Callable[[Answer], float]) -> Interval:
    values = torch.tensor([figure(answer) for answer in row.answers.values()])
    return _interval(float(values.mean()), values[_resamples(len(values))].mean(-1))


def _resamples(count: int) -> torch.Tensor:
    """int64 [RESAMPLES, count], the same each time."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def _interval(value: float, resampled: torch.Tensor) -> Interval:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval(value, low, high)
