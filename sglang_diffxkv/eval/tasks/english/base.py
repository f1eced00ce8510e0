# SPDX-License-Identifier: Apache-2.0
"""How a task is put to an instruct model, in the manner of RULER.

What to look out for is said before the text, the question comes after it, and the assistant's turn
has begun: the answer is what follows. A task's answers may take as many tokens as RULER gives it.
"""

from collections.abc import Iterable, Sequence

from sglang_diffxkv.eval.tasks.base import Question, Sample
from sglang_diffxkv.eval.tasks.words import CITIES, NAMES

NIAH_TOKENS, VT_TOKENS, CWE_TOKENS, FWE_TOKENS, QA_TOKENS = 128, 30, 120, 50, 32
"""RULER's `tokens_to_generate`."""


def question(text: str, prefix: str, references: Sequence[str], max_tokens: int) -> Question:
    """A question whose answer is right when all `references` are in it."""
    answer = enumerate_in_words(references)
    return Question(text, answer, tuple(references), prefix, max_tokens, exact=False)


def document(instruction: str, text: str, questions: Iterable[Question]) -> Sample:
    """`instruction`, `text` and a question, as one message of the user."""
    context = (("user", f"{instruction}\n\n{text}"),)
    return Sample(context, tuple(questions), separator="\n\n")


def enumerate_in_words(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last


def spell(word: str) -> str:
    """`word`, with a capital where it is a name."""
    return word.title() if word in NAMES or word in CITIES else word
