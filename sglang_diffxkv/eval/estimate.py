# SPDX-License-Identifier: Apache-2.0
"""Means and shares with their 95 % intervals."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Z = 1.96
"""Of a 95 % interval."""
_RESAMPLES = 500


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def hit_rate(hits: Sequence[bool], documents: Sequence[int]) -> Estimate:
    """Share of hits: Wilson's interval, or one over documents where some have several samples."""
    groups = by_document([float(hit) for hit in hits], documents)
    if len(groups) == len(hits):
        return wilson(sum(hits), len(hits))
    spread = mean(groups)
    low, high = max(0.0, spread.low), min(1.0, spread.high)
    return Estimate(sum(hits) / len(hits), low, high)


def by_document(values: Sequence[float], documents: Sequence[int]) -> list[float]:
    """Means over the samples of each document: they share its KV, so only documents count."""
    groups: dict[int, list[float]] = defaultdict(list)
    for value, document in zip(values, documents, strict=True):
        groups[document].append(value)
    return [sum(group) / len(group) for group in groups.values()]


def wilson(hits: float, count: int) -> Estimate:
    """Share `hits / count` with Wilson's 95 % interval, which holds near 0 and 1, too."""
    share, z2 = hits / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + (z2 / (4 * count**2)))
    # Rounding may put the share an ulp beyond an end that it should meet.
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def mean(values: Sequence[float]) -> Estimate:
    """Mean over samples with its 95 % interval by the normal approximation."""
    average = sum(values) / len(values)
    spread = sum((value - average) ** 2 for value in values) / max(1, len(values) - 1)
    half = Z * math.sqrt(spread / len(values))
    return Estimate(average, average - half, average + half)


def bootstrap(documents: Sequence[np.ndarray], statistic: Callable[[np.ndarray], Any]) -> Estimate:
    """`statistic` of all values, with the interval of its values over documents drawn anew.

    Tokens of one document are not independent, so documents are drawn, whole.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(documents), size=(_RESAMPLES, len(documents)))
    found = [statistic(np.concatenate([documents[i] for i in places])) for places in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(float(statistic(np.concatenate(documents))), float(low), float(high))
