# SPDX-License-Identifier: Apache-2.0
"""Figures of one cell: how right the answers are, how close to full KV, and in how many bytes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_diffxkv.eval.ask import Answer, CellAnswers, Distribution, divergence
from sglang_diffxkv.eval.prompts import Cell
from sglang_diffxkv.eval.tasks.base import Question
from sglang_diffxkv.eval.variants import FULL, Variant
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

Z = 1.96
"""Of a 95 % interval."""
TELLS = 2 / 3
"""Accuracy of full KV from which on a cell tells what a policy costs."""


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
    documents: int
    """That the samples are about: several questions about one are not independent."""
    accuracy: float
    """Share of answers that are right (`is_right`)."""
    accuracy_low: float
    accuracy_high: float
    recall: float
    """Share of the references that the answers contain (RULER's string match)."""
    agreement: float
    """With full KV: share of the places of its answers at which the same token is likeliest."""
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
    asked = [
        (prompt.question, answer.text) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    documents = [prompt.document for prompt in prompts]
    right = hit_rate([is_right(question, text) for question, text in asked], documents)
    pairs = list(zip(full.answers, answers, strict=True))
    agreement = mean(
        by_document([_agreement(a.distributions, b.distributions) for a, b in pairs], documents)
    )
    kl = mean(by_document([_kl(a, b) for a, b in pairs], documents))
    recalled = [found_share(text, question.references) for question, text in asked]
    tokens = sum(len(prompt.ids) for prompt in prompts)
    return Row(
        policy=variant.name,
        target=variant.target,
        task=cell.task,
        length=cell.length,
        samples=len(prompts),
        documents=len(set(documents)),
        accuracy=right.mean,
        accuracy_low=right.low,
        accuracy_high=right.high,
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
        **pool_figures(found.stats),
    )


def normalise(text: str) -> str:
    """Without differences in white space."""
    return " ".join(text.split())


def is_right(question: Question, text: str) -> bool:
    """Whether `text` is the exact answer where one is expected, else has all references in it."""
    if question.exact:
        return normalise(text) == normalise(question.answer)
    return found_share(text, question.references) == 1


def found_share(text: str, references: Sequence[str]) -> float:
    """Share of `references` that are in `text`, in any case, as RULER's string match has it.

    Other than there only whole words count: a bath is no bat.
    """
    plain = normalise(text)
    found = [bool(re.search(rf"\b{re.escape(ref)}\b", plain, re.I)) for ref in references]
    return sum(found) / len(found)


def failures(rows: Sequence[Row]) -> list[Row]:
    """Rows of full KV whose cell tells nothing about policies: full KV itself has it wrong."""
    return [row for row in rows if row.policy == FULL and row.accuracy < TELLS]


def telling(rows: Sequence[Row]) -> list[Row]:
    """The rows of all other cells."""
    failed = {(row.task, row.length) for row in failures(rows)}
    return [row for row in rows if (row.task, row.length) not in failed]


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


def pool_figures(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of the pool, all batches taken together."""
    if not stats:
        shares = dict.fromkeys(("kept_high", "kept_low", "pruned", "sealed"))
        return shares | {"physical_compression": 1.0, "under_pressure": 0}
    tiers = {
        tier: sum(stat["tier_tokens"][tier] for stat in stats) for tier in ("high", "low", "pruned")
    }
    entries = max(1, sum(tiers.values()))
    in_use = [stat["bytes_in_use"] for stat in stats]
    dense = [stat["physical_compression"] * n for stat, n in zip(stats, in_use, strict=True)]
    sealed = sum(stat["sealed_pages"] for stat in stats) * PAGE_TOKENS
    return {
        "physical_compression": sum(dense) / sum(in_use),
        "kept_high": tiers["high"] / entries,
        "kept_low": tiers["low"] / entries,
        "pruned": tiers["pruned"] / entries,
        "sealed": sealed / sum(stat["tokens_held"] for stat in stats),
        # Counted since the server's start: any is too many.
        "under_pressure": stats[-1]["counters"]["sealed_under_pressure"],
    }
