# SPDX-License-Identifier: Apache-2.0
"""Prompts of an evaluation: a task's samples, as token ids of the model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene
from sglang_diffxkv.eval.tasks.registry import BUNDLED_SUITE, SHARED_TASKS, Suite

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
    max_tokens: int
    """Of the answer."""


class Stop(NamedTuple):
    """What ends an answer beside the end-of-sequence tokens of the checkpoint."""

    token_ids: list[int]
    strings: list[str]


class Cell(NamedTuple):
    """What one figure is measured on."""

    task: str
    length: int
    prompts: list[Prompt]
    stop: Stop


def make_cells(
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    suite: Suite = BUNDLED_SUITE,
) -> list[Cell]:
    """`samples` prompts of each task and length; the same arguments give the same prompts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        lengths: tokens of a context, about: instructions, question and chat template come on top.
    """
    stop = find_stop(tokenizer)
    return [
        Cell(task, length, _prompts(tokenizer, suite, task, length, samples, seed), stop)
        for task in tasks
        for length in lengths
    ]


def find_stop(tokenizer: Any) -> Stop:
    """The token that ends a turn in the chat template, or an empty line where there is none.

    Checkpoints do not always list the former among their end-of-sequence tokens, and a model
    that has no turns goes on with text of its own.
    """
    if tokenizer.chat_template is None:
        return Stop([], ["\n\n"])
    answer = "answer"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    rest = tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False)
    return Stop([id for id in rest if id in special][:1], [])


def _prompts(
    tokenizer: Any, suite: Suite, task: str, length: int, samples: int, seed: int
) -> list[Prompt]:
    shared = SHARED_TASKS.get(task)
    prompts: list[Prompt] = []
    document = 0
    while len(prompts) < samples:
        rng = Random(f"{seed} {shared.of if shared else task} {length} {document}")
        scene = Scene(
            rng,
            suite.filler,
            length,
            SHARED_QUESTIONS if shared else 1,
            lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        )
        sample = suite.tasks[shared.of if shared else task](scene)
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
    most = question.max_tokens
    if most is None:
        most = 2 * len(tokenizer.encode(f" {question.answer}", add_special_tokens=False)) + 16
    return Prompt(warm, ids, question, document, f"{document}{suffix}", most)


def _tokens(tokenizer: Any, sample: Sample, question: Question) -> list[int]:
    messages = [{"role": role, "content": text} for role, text in sample.messages(question)]
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages) + "\n"
        ids: list[int] = tokenizer.encode(text + question.prefix)
        return ids
    # Templates that do not know of thinking ignore the argument.
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    ids = tokenizer.encode(text + question.prefix, add_special_tokens=False)
    return ids
