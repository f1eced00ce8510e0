# SPDX-License-Identifier: Apache-2.0
"""Accuracy against bytes: one curve per policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_diffxkv.eval.estimate import wilson
from sglang_diffxkv.eval.page import marker, panels
from sglang_diffxkv.eval.questions.score import QuestionRecord


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


def points(records: Sequence[QuestionRecord]) -> list[Point]:
    """Records of one variant and length, taken together: their samples are pooled."""
    groups: dict[tuple[str, float | None, int], list[QuestionRecord]] = defaultdict(list)
    for record in records:
        groups[record.policy, record.target, record.length].append(record)
    return [_point(*key, group) for key, group in groups.items()]


def _point(
    policy: str, target: float | None, length: int, records: Sequence[QuestionRecord]
) -> Point:
    samples = sum(record.samples for record in records)
    rate = sum(record.accuracy * record.samples for record in records) / samples
    # As if the answers about one document were all right or all wrong: never too narrow.
    documents = sum(record.documents for record in records)
    right = wilson(rate * documents, documents)
    share = sum(1 / record.physical_compression for record in records) / len(records)
    recall = sum(record.recall * record.samples for record in records) / samples
    return Point(policy, target, length, share, *right, samples, recall)


def error_bars(found: Sequence[Point]) -> list[list[float]]:
    """Lengths of the intervals below and above the accuracy of each point; [2, N]."""
    return [[p.accuracy - p.low for p in found], [p.high - p.accuracy for p in found]]


def plot(path: Path, records: Sequence[QuestionRecord]) -> None:
    """Write a picture: accuracy above, recall below, a column for each length."""
    found = points(records)
    lengths = sorted({point.length for point in found})
    figure, drawn = panels(len(lengths), 6.4, sharex="col", sharey="row")
    for column, length in enumerate(lengths):
        here = [point for point in found if point.length == length]
        above, below = drawn[:, column]
        for i, policy in enumerate(dict.fromkeys(point.policy for point in here)):
            curve = sorted((p for p in here if p.policy == policy), key=lambda p: p.bytes_share)
            x = [p.bytes_share for p in curve]
            style: dict[str, Any] = {"marker": marker(i), "label": policy}
            above.errorbar(x, [p.accuracy for p in curve], error_bars(curve), capsize=2, **style)
            below.plot(x, [p.recall for p in curve], **style)
        above.set(title=f"{length:,} tokens")
        below.set(xlabel="bytes, relative to full KV", xscale="log")
    for panel, name in zip(drawn[:, 0], ("accuracy", "recall"), strict=True):
        panel.set_ylabel(name)
    drawn[0, -1].legend(fontsize="small")
    figure.savefig(path)
