# SPDX-License-Identifier: Apache-2.0
"""A chat of many turns in which the user later asks for what was said earlier."""

from itertools import product

from sglang_diffxkv.eval.tasks.base import Message, Sample, Scene, hide, pick
from sglang_diffxkv.eval.tasks.english.base import QA_TOKENS, question, spell
from sglang_diffxkv.eval.tasks.recall import ATTRIBUTES, PEOPLE, REPLY

_TOKENS_PER_TURN = (40, 300)
_FRAME = 12
"""Tokens around a turn's text, about: the reply and what the chat template adds."""
_INSTRUCTION = "I will tell you about people that I know. Remember it: I will ask for it later."


def recall(scene: Scene) -> Sample:
    """Facts about people, one per turn, among filler; some are asked for in the end."""
    pairs = list(product(ATTRIBUTES, PEOPLE))
    turns = max(2, min(scene.budget // scene.rng.randint(*_TOKENS_PER_TURN), len(pairs)))
    facts = {
        (kind, who): spell(scene.rng.choice(ATTRIBUTES[kind]))
        for kind, who in scene.rng.sample(pairs, turns)
    }
    each = scene._replace(budget=max(1, scene.budget // turns - _FRAME))
    context: list[Message] = []
    for (kind, who), value in facts.items():
        told = hide(each, [f"The {kind} of my {who} is {value}."])
        context.append(("user", f"{_INSTRUCTION}\n\n{told}" if not context else told))
        context.append(("assistant", REPLY))
    questions = [
        question(
            f"What is the {kind} of my {who}?",
            f"The {kind} of your {who} is",
            [facts[kind, who]],
            QA_TOKENS,
        )
        for kind, who in pick(scene, list(facts))
    ]
    return Sample(tuple(context), tuple(questions))
