# SPDX-License-Identifier: Apache-2.0
"""Figures of one cell: how right the answers are, how close to full KV, and in how many bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_diffxkv.eval.ask import Answer, CellAnswers, Distribution, divergence
from sglang_diffxkv.eval.prompts import Cell
from sglang_diffxkv.eval.variants import Variant
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

Z = 1.96
"""Of a 95 % interval."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class Row(NamedTuple):
    """One policy on one task at one length; `None` stands for what does not apply."""

    policy: str
    target: float | None
    task: str
    length: int
    samples: int
    exact_match: float
    exact_match_low: float
    exact_match_high: float
    recall: float
    """Share of answers that contain every reference (RULER's string match)."""
    agreement: float
    """With full KV: share of its answers' tokens that are the likeliest here, too."""
    agreement_low: float
    agreement_high: float
    mean_kl: float
    mean_kl_low: float
    mean_kl_high: float
    output_tokens: float
    physical_compression: float
    kept_high: float | None
    """Shares of the (token, KV head, layer) entries of sealed pages."""
    kept_low: float | None
    pruned: float | None
    sealed: float | None
    """Share of the tokens held that is in sealed pages; the others are raw."""
    under_pressure: int
    """Pages that were sealed early for want of memory: figures hold where this is 0."""
    prompt_tokens: float
    cached: float
    """Share of prompt tokens that were read from the cache, as the policy left them."""


def score(variant: Variant, cell: Cell, found: CellAnswers, full: CellAnswers) -> Row:
    """The row of `found`; `full` are the answers of SGLang's own pool to the same prompts."""
    prompts, answers = cell.prompts, found.answers
    right = [
        normalise(answer.text) == normalise(prompt.question.answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    exact = wilson(sum(right), len(right))
    pairs = list(zip(full.answers, answers, strict=True))
    agreement = mean([_agreement(a.distributions, b.distributions) for a, b in pairs])
    kl = mean([_kl(a, b) for a, b in pairs])
    recalled = [
        all(reference in normalise(answer.text) for reference in prompt.question.references)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    tokens = sum(len(prompt.ids) for prompt in prompts)
    return Row(
        policy=variant.name,
        target=variant.target,
        task=cell.task,
        length=cell.length,
        samples=len(prompts),
        exact_match=exact.mean,
        exact_match_low=exact.low,
        exact_match_high=exact.high,
        recall=sum(recalled) / len(recalled),
        agreement=agreement.mean,
        agreement_low=agreement.low,
        agreement_high=agreement.high,
        mean_kl=kl.mean,
        mean_kl_low=kl.low,
        mean_kl_high=kl.high,
        output_tokens=sum(len(answer.ids) for answer in answers) / len(answers),
        prompt_tokens=tokens / len(prompts),
        cached=sum(answer.cached_tokens for answer in answers) / tokens,
        **_pool(found.stats),
    )


def normalise(text: str) -> str:
    """Without differences in white space."""
    return " ".join(text.split())


def wilson(hits: int, count: int) -> Estimate:
    """Share `hits / count` with Wilson's 95 % interval, which holds near 0 and 1, too."""
    share, z2 = hits / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + (z2 / (4 * count**2)))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: Sequence[float]) -> Estimate:
    """Mean over samples with its 95 % interval by the normal approximation."""
    average = sum(values) / len(values)
    spread = sum((value - average) ** 2 for value in values) / max(1, len(values) - 1)
    half = Z * math.sqrt(spread / len(values))
    return Estimate(average, average - half, average + half)


def _agreement(full: Sequence[Distribution], other: Sequence[Distribution]) -> float:
    same = [
        max(a, key=a.__getitem__) == max(b, key=b.__getitem__)
        for a, b in zip(full, other, strict=True)
    ]
    return sum(same) / len(same)


def _kl(full: Answer, other: Answer) -> float:
    """Mean over the tokens of one answer: they share its KV, so only prompts are independent."""
    values = [
        divergence(a, b) for a, b in zip(full.distributions, other.distributions, strict=True)
    ]
    return sum(values) / len(values)


def _pool(stats: dict[str, Any] | None) -> dict[str, Any]:
    if stats is None:
        shares = dict.fromkeys(("kept_high", "kept_low", "pruned", "sealed"))
        return shares | {"physical_compression": 1.0, "under_pressure": 0}
    tiers = stats["tier_tokens"]
    entries = max(1, sum(tiers.values()))
    return {
        "physical_compression": _compression(stats),
        "kept_high": tiers["high"] / entries,
        "kept_low": tiers["low"] / entries,
        "pruned": tiers["pruned"] / entries,
        "sealed": stats["sealed_pages"] * PAGE_TOKENS / max(1, stats["tokens_held"]),
        "under_pressure": stats["counters"]["sealed_under_pressure"],
    }


def _compression(stats: dict[str, Any]) -> float:
    """Of the pages held, by every byte they take.

    An evaluation's pool is made far larger than what it holds, so that nothing is sealed early; of
    the directory, which is as large as the pool, it counts the entries of the pages held.
    """
    dense = stats["physical_compression"] * stats["bytes_in_use"]
    directory = stats["bytes"]["directory"]
    pages = stats["sealed_pages"] + stats["open_pages"]
    entries = directory * pages / stats["virtual_pages"]
    taken: float = stats["bytes_in_use"] - directory + entries
    return dense / taken if taken else 1.0
