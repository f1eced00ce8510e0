# SPDX-License-Identifier: Apache-2.0
"""Prompts of an evaluation: a task's samples, as token ids of the model at hand."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene
from sglang_diffxkv.eval.tasks.registry import SHARED_TASKS, TASKS
from sglang_diffxkv.eval.tasks.words import HELD_OUT

SHARED_QUESTIONS = 8
"""Questions about one document of a shared-prefix task: the first only fills the cache."""


class Prompt(NamedTuple):
    """One question, and the request after which it is asked.

    `warm` is sent first, so that its pages are sealed; `ids` then reads them through the prefix
    cache. The two are equal, or `warm` asks another question of the same document. Prompts with
    one `namespace` may share cached pages.
    """

    warm: list[int]
    ids: list[int]
    question: Question
    document: int
    """Number of the sample that it is about: answers about one are not independent."""
    namespace: str
    answer_tokens: int
    """Of the expected answer."""


class Cell(NamedTuple):
    """What one figure is measured on."""

    task: str
    length: int
    prompts: list[Prompt]


def make_cells(
    tokenizer: Any, tasks: list[str], lengths: list[int], samples: int, seed: int
) -> list[Cell]:
    """`samples` prompts of each task and length; the same arguments give the same prompts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        lengths: tokens of a prompt, about: the question and the chat template come on top.
    """
    return [
        Cell(task, length, _prompts(tokenizer, task, length, samples, seed))
        for task in tasks
        for length in lengths
    ]


def _prompts(tokenizer: Any, task: str, length: int, samples: int, seed: int) -> list[Prompt]:
    shared = SHARED_TASKS.get(task)
    prompts: list[Prompt] = []
    document = 0
    while len(prompts) < samples:
        rng = Random(f"{seed} {shared.of if shared else task} {length} {document}")
        scene = Scene(
            rng,
            HELD_OUT,
            length,
            SHARED_QUESTIONS if shared else 1,
            lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        )
        sample = TASKS[shared.of if shared else task](scene)
        first, *others = (_tokens(tokenizer, sample, question) for question in sample.questions)
        if shared is None:
            prompts.append(_prompt(tokenizer, first, first, sample.questions[0], document, ""))
        for i, (ids, question) in enumerate(zip(others, sample.questions[1:], strict=True)):
            if shared and shared.recomputed:
                prompts.append(_prompt(tokenizer, ids, ids, question, document, f"-{i}"))
            elif shared:
                prompts.append(_prompt(tokenizer, first, ids, question, document, ""))
        document += 1
    return prompts[:samples]


def _prompt(
    tokenizer: Any,
    warm: list[int],
    ids: list[int],
    question: Question,
    document: int,
    suffix: str,
) -> Prompt:
    answer = len(tokenizer.encode(f" {question.answer}", add_special_tokens=False))
    return Prompt(warm, ids, question, document, f"{document}{suffix}", answer)


def _tokens(tokenizer: Any, sample: Sample, question: Question) -> list[int]:
    messages = [{"role": role, "content": text} for role, text in sample.messages(question)]
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages) + "\n"
        ids: list[int] = tokenizer.encode(text)
        return ids
    # Templates that do not know of thinking ignore the argument.
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids
