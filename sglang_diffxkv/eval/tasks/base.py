# SPDX-License-Identifier: Apache-2.0
"""What a task is: it writes a sample, a context of known content with questions about it."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple, TypeVar

Filler = Callable[[Random], Iterator[str]]
"""Endless sentences that say nothing of use."""
_Item = TypeVar("_Item")
Message = tuple[str, str]
"""Role (`user` or `assistant`) and text."""


class Question(NamedTuple):
    text: str
    answer: str
    """What a perfect model says, after the prefix."""
    references: tuple[str, ...]
    """What an answer must contain, as RULER's string match has it."""
    prefix: str = ""
    """How the assistant's turn begins, as RULER has it: what follows is the answer."""
    max_tokens: int | None = None
    """Of an answer at most; None: twice what `answer` takes, and 16."""
    exact: bool = True
    """Whether nothing but `answer` is right, as the bundled model was trained to give it; else
    whatever has all `references` in it is."""


class Sample(NamedTuple):
    """A conversation so far, and questions about it that do not depend on one another."""

    context: tuple[Message, ...]
    questions: tuple[Question, ...]
    separator: str = " "
    """Between the context and a question in one message."""

    def messages(self, question: Question) -> tuple[Message, ...]:
        """The conversation up to and with `question`."""
        role, text = self.context[-1]
        if role == "user":
            return (*self.context[:-1], ("user", f"{text}{self.separator}{question.text}"))
        return (*self.context, ("user", question.text))


class Scene(NamedTuple):
    """What a sample is written for."""

    rng: Random
    filler: Filler
    budget: int
    """Tokens of the context, about."""
    questions: int
    """Questions to ask at most; a task asks none twice."""
    size: Callable[[str], int]
    """Tokens of a text."""


Maker = Callable[[Scene], Sample]


def hide(scene: Scene, needles: Sequence[str]) -> str:
    """Text of the budgeted length: `needles` in their order, at random places among filler."""
    length = sum(scene.size(f" {needle}") for needle in needles)
    hay: list[str] = []
    sentences = scene.filler(scene.rng)
    while length < scene.budget:
        hay.append(next(sentences))
        length += scene.size(f" {hay[-1]}")
    places = sorted(scene.rng.randint(0, len(hay)) for _ in needles)
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        hay.insert(place, needle)
    return " ".join(hay)


def pick(scene: Scene, items: Sequence[_Item]) -> Sequence[_Item]:
    """As many of `items` as questions are to be asked, in random order."""
    return scene.rng.sample(items, min(scene.questions, len(items)))
