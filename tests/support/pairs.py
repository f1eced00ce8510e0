# SPDX-License-Identifier: Apache-2.0
"""Parameters of tests whose product would be long: every two values meet, not every three."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairs(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of the factors' values in which any two values of two factors occur together.

    Chosen greedily, in the order of the product.
    """
    rows = list(product(*(range(len(factor)) for factor in factors)))
    missing = {pair for row in rows for pair in _pairs_of(row)}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(missing & _pairs_of(row)))
        missing -= _pairs_of(best)
        chosen.append(tuple(factor[i] for factor, i in zip(factors, best, strict=True)))
    return chosen


def in_turn(
    values: Sequence[Any], always: Sequence[tuple[Any, ...]], others: Sequence[tuple[Any, ...]]
) -> list[tuple[Any, ...]]:
    """Each value with all of ``always``, and with one of ``others``, which take turns."""
    return [
        (value, *row)
        for i, value in enumerate(values)
        for row in (*always, others[i % len(others)])
    ]


def _pairs_of(row: tuple[int, ...]) -> set[Any]:
    return set(combinations(enumerate(row), 2))
