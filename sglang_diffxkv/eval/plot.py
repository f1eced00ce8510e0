# SPDX-License-Identifier: Apache-2.0
"""Accuracy against bytes: one curve per policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_diffxkv.eval.score import Row, wilson


class Point(NamedTuple):
    """A variant at one length, over all its tasks."""

    policy: str
    target: float | None
    length: int
    bytes_share: float
    """Of what SGLang's own pool takes; mean over tasks."""
    accuracy: float
    low: float
    high: float
    samples: int
    recall: float


def points(rows: Sequence[Row]) -> list[Point]:
    """Rows of one variant and length, taken together: their samples are pooled."""
    groups: dict[tuple[str, float | None, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.policy, row.target, row.length].append(row)
    return [_point(*key, group) for key, group in groups.items()]


def _point(policy: str, target: float | None, length: int, rows: Sequence[Row]) -> Point:
    samples = sum(row.samples for row in rows)
    rate = sum(row.accuracy * row.samples for row in rows) / samples
    # As if the answers about one document were all right or all wrong: never too narrow.
    documents = sum(row.documents for row in rows)
    right = wilson(rate * documents, documents)
    share = sum(1 / row.physical_compression for row in rows) / len(rows)
    recall = sum(row.recall * row.samples for row in rows) / samples
    return Point(policy, target, length, share, *right, samples, recall)


def error_bars(found: Sequence[Point]) -> list[list[float]]:
    """Lengths of the intervals below and above the accuracy of each point; [2, N]."""
    return [[p.accuracy - p.low for p in found], [p.high - p.accuracy for p in found]]


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Write a picture: accuracy above, recall below, a column for each length."""
    from matplotlib.figure import Figure

    found = points(rows)
    lengths = sorted({point.length for point in found})
    figure = Figure(figsize=(6.4 * len(lengths), 8), layout="constrained")
    panels = figure.subplots(2, len(lengths), sharex="col", sharey="row", squeeze=False)
    for column, length in enumerate(lengths):
        here = [point for point in found if point.length == length]
        above, below = panels[:, column]
        for i, policy in enumerate(dict.fromkeys(point.policy for point in here)):
            curve = sorted((p for p in here if p.policy == policy), key=lambda p: p.bytes_share)
            x = [p.bytes_share for p in curve]
            ends = error_bars(curve)
            style: dict[str, Any] = {"marker": "os^vD*Px<>d"[i % 11], "label": policy}
            above.errorbar(x, [p.accuracy for p in curve], ends, capsize=2, **style)
            below.plot(x, [p.recall for p in curve], **style)
        above.set(title=f"{length:,} tokens")
        below.set(xlabel="bytes, relative to full KV", xscale="log")
    for panel, name in zip(panels[:, 0], ("accuracy", "recall"), strict=True):
        panel.set_ylabel(name)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    panels[0, -1].legend(fontsize="small")
    figure.savefig(path)
