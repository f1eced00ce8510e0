# SPDX-License-Identifier: Apache-2.0
"""Figures of one cell: how right the answers are, how close to full KV, and in how many bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_diffxkv.eval.ask import Distribution, agrees, divergence
from sglang_diffxkv.eval.estimate import by_document, hit_rate, mean
from sglang_diffxkv.eval.questions.answers import Answer, CellAnswers
from sglang_diffxkv.eval.questions.prompts import Cell
from sglang_diffxkv.eval.record import Record, pool_figures
from sglang_diffxkv.eval.tasks.base import Question
from sglang_diffxkv.eval.variants import Variant

TELLS = 2 / 3
"""Accuracy of full KV from which on a cell tells what a policy costs."""


@dataclass(frozen=True)
class QuestionRecord(Record):
    """How one variant answers."""

    samples: int
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
    prompt_tokens: float
    cached: float
    """Share of prompt tokens that were read from the cache, as the policy left them."""


def score(variant: Variant, cell: Cell, found: CellAnswers, full: CellAnswers) -> QuestionRecord:
    """The record of `found`; `full` are the answers of SGLang's own pool to the same prompts."""
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
    return QuestionRecord(
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


def failures(records: Sequence[QuestionRecord]) -> list[QuestionRecord]:
    """Those of full KV whose cell tells nothing about policies: full KV itself has it wrong."""
    return [record for record in records if record.is_full and record.accuracy < TELLS]


def telling(records: Sequence[QuestionRecord]) -> list[QuestionRecord]:
    """The records of all other cells."""
    failed = {(record.task, record.length) for record in failures(records)}
    return [record for record in records if (record.task, record.length) not in failed]


def _agreement(full: Sequence[Distribution], other: Sequence[Distribution]) -> float:
    same = [agrees(a, b) for a, b in zip(full, other, strict=True)]
    return sum(same) / len(same)


def _kl(full: Answer, other: Answer) -> float:
    """Mean over the tokens of one answer: they share its KV, so only prompts are independent."""
    values = [
        divergence(a, b) for a, b in zip(full.distributions, other.distributions, strict=True)
    ]
    return sum(values) / len(values)
