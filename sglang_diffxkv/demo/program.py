# SPDX-License-Identifier: Apache-2.0
"""A program in SGLang's frontend language: fork over a shared document, join, select."""

from typing import NamedTuple

import sglang as sgl

from sglang_diffxkv.eval.tasks.base import Question

_MAX_TOKENS = 8


class Findings(NamedTuple):
    answers: list[str]
    """To each question."""
    choice: str
    """Of the offered ones, as the answer to the last question."""


def review(url: str, document: str, questions: list[Question], choices: list[str]) -> Findings:
    """Ask all `questions` about `document` at once, then have the last one's answer selected.

    Raises:
        RuntimeError: the server at `url` gave no answer or a choice that was not offered.
    """
    texts = [question.text for question in questions]
    # As the chat template writes it: the answer's first word brings its own space.
    offered = [f" {choice}" for choice in choices]
    state = _review.run(
        document=document,
        questions=texts,
        choices=offered,
        backend=sgl.RuntimeEndpoint(url),
        temperature=0,
    )
    choice = str(state["choice"])
    if choice not in offered:
        raise RuntimeError(f"sgl.select chose {choice!r}, which was not among {offered}")
    return Findings([answer.strip() for answer in state["answers"]], choice.strip())


@sgl.function
def _review(s, document, questions, choices):  # type: ignore[no-untyped-def]  # SGLang's names
    s += f"<|user|> {document}"
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += f" {question}<|end|><|assistant|>"
        branch += sgl.gen("answer", max_tokens=_MAX_TOKENS, stop="<|end|>")
    s.set_var("answers", [branch["answer"] for branch in branches])
    s += f" {questions[-1]}<|end|><|assistant|>"
    s += sgl.select("choice", choices=choices)
