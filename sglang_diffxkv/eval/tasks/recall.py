# SPDX-License-Identifier: Apache-2.0
"""A chat of many turns in which the user later asks for what was said earlier."""

from itertools import product

from sglang_diffxkv.eval.tasks.base import Message, Question, Sample, Scene, hide, pick
from sglang_diffxkv.eval.tasks.words import ANIMALS, CITIES, COLORS, JOBS, NAMES

ATTRIBUTES = {"name": NAMES, "city": CITIES, "job": JOBS, "color": COLORS, "pet": ANIMALS}
_PEOPLE = "aunt boss brother cousin doctor father friend mother neighbor sister uncle"
PEOPLE = tuple(_PEOPLE.split())
REPLY = "Noted."

_TOKENS_PER_TURN = (40, 300)
_FRAME = 6
"""Tokens around a turn's text, about: the reply and what the chat template adds."""


def recall(scene: Scene) -> Sample:
    """Facts about people, one per turn, among filler; some are asked for in the end."""
    pairs = list(product(ATTRIBUTES, PEOPLE))
    turns = max(2, min(scene.budget // scene.rng.randint(*_TOKENS_PER_TURN), len(pairs)))
    asked = scene.rng.sample(pairs, turns)
    facts = {f"{kind} of my {who}": scene.rng.choice(ATTRIBUTES[kind]) for kind, who in asked}
    each = scene._replace(budget=scene.budget // turns - _FRAME)
    context: list[Message] = []
    for fact, value in facts.items():
        context.append(("user", hide(each, [f"The {fact} is {value}."])))
        context.append(("assistant", REPLY))
    questions = [
        Question(f"What is the {fact}?", facts[fact], (facts[fact],))
        for fact in pick(scene, list(facts))
    ]
    return Sample(tuple(context), tuple(questions))
