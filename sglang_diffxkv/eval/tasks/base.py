# SPDX-License-Identifier: Apache-2.0
"""What a task is: it writes a sample, a context of known content with questions about it."""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from sglang_diffxkv.eval.tasks.words import Filler

Message = tuple[str, str]
"""Role (`user` or `assistant`) and text."""


class Question(NamedTuple):
    text: str
    answer: str
    """What the bundled model was trained to say."""
    references: tuple[str, ...]
    """What an answer must contain, as RULER's string match has it."""


class Sample(NamedTuple):
    """A conversation so far, and questions about it that do not depend on one another."""

    context: tuple[Message, ...]
    questions: tuple[Question, ...]

    def messages(self, question: Question) -> tuple[Message, ...]:
        """The conversation up to and with `question`."""
        role, text = self.context[-1]
        if role == "user":
            return (*self.context[:-1], ("user", f"{text} {question.text}"))
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


def sentence(scene: Scene) -> str:
    """A sentence that says nothing of use."""
    rng, (nouns, verbs, adverbs) = scene.rng, scene.filler
    start = f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}"
    return f"{start} {rng.choice(adverbs)}." if rng.random() < 0.5 else f"{start}."


def hide(scene: Scene, needles: Sequence[str]) -> str:
    """Text of the budgeted length: `needles` in their order, at random places among filler."""
    length = sum(scene.size(f" {needle}") for needle in needles)
    hay = []
    while length < scene.budget:
        hay.append(sentence(scene))
        length += scene.size(f" {hay[-1]}")
    places = sorted(scene.rng.randint(0, len(hay)) for _ in needles)
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        hay.insert(place, needle)
    return " ".join(hay)


def pick(scene: Scene, items: Sequence[str]) -> Sequence[str]:
    """As many of `items` as questions are to be asked, in random order."""
    return scene.rng.sample(items, min(scene.questions, len(items)))
