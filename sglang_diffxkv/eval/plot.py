# SPDX-License-Identifier: Apache-2.0
"""Accuracy against bytes: one curve per policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sglang_diffxkv.eval.score import Row, wilson


class Point(NamedTuple):
    """A variant at one length, over all its tasks."""

    policy: str
    target: float | None
    length: int
    bytes_share: float
    """Of what SGLang's own pool takes; mean over tasks."""
    exact_match: float
    low: float
    high: float
    samples: int


def points(rows: Sequence[Row]) -> list[Point]:
    """Rows of one variant and length, taken together: their samples are pooled."""
    groups: dict[tuple[str, float | None, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.policy, row.target, row.length].append(row)
    return [_point(*key, group) for key, group in groups.items()]


def _point(policy: str, target: float | None, length: int, rows: Sequence[Row]) -> Point:
    samples = sum(row.samples for row in rows)
    exact = wilson(round(sum(row.exact_match * row.samples for row in rows)), samples)
    share = sum(1 / row.physical_compression for row in rows) / len(rows)
    return Point(policy, target, length, share, *exact, samples)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Write a picture with one panel per length; its format is that of the file's name."""
    from matplotlib.figure import Figure

    found = points(rows)
    lengths = sorted({point.length for point in found})
    figure = Figure(figsize=(6.4 * len(lengths), 4.8), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths, strict=True):
        here = [point for point in found if point.length == length]
        for i, policy in enumerate(dict.fromkeys(point.policy for point in here)):
            curve = sorted((p for p in here if p.policy == policy), key=lambda p: p.bytes_share)
            x, y = [p.bytes_share for p in curve], [p.exact_match for p in curve]
            # Rounding may put a mean outside its interval by an ulp.
            below = [max(0.0, p.exact_match - p.low) for p in curve]
            above = [max(0.0, p.high - p.exact_match) for p in curve]
            marker = "os^vD*Px<>d"[i % 11]
            panel.errorbar(x, y, [below, above], marker=marker, capsize=2, label=policy)
        panel.set(title=f"{length:,} tokens", xlabel="bytes, relative to full KV", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("exact match")
    panels[-1].legend(fontsize="small")
    figure.savefig(path)
