# SPDX-License-Identifier: Apache-2.0
"""Needles in a haystack: magic numbers in a text, or a table of nothing else."""

import json

from sglang_diffxkv.eval.tasks.base import Sample, Scene, hide, pick
from sglang_diffxkv.eval.tasks.english.base import (
    NIAH_TOKENS,
    document,
    enumerate_in_words,
    question,
)
from sglang_diffxkv.eval.tasks.words import ANIMALS, COLORS, THINGS

_NEEDLES = 4
"""As many as RULER hides where there are several, or as many as are asked for."""
_VALUES = range(1_000_000, 10_000_000)
_NOUNS = (*ANIMALS, *THINGS)


def niah_single(scene: Scene) -> Sample:
    """One number in the text, which is asked for."""
    return _sample(scene, 1)


def niah_multikey(scene: Scene) -> Sample:
    """Several numbers in the text, of which one is asked for."""
    return _sample(scene, max(_NEEDLES, scene.questions))


def niah_multiquery(scene: Scene) -> Sample:
    """Several numbers in the text, all of which are asked for at once."""
    facts = _facts(scene, _NEEDLES)
    keys = enumerate_in_words(scene.rng.sample(list(facts), _NEEDLES))
    asked = question(
        f"What are the special magic numbers for {keys} that the text mentions?",
        f"The special magic numbers for {keys} mentioned in the text are",
        list(facts.values()),
        NIAH_TOKENS,
    )
    return document(_instruction(_NEEDLES), _haystack(scene, facts), [asked])


def kv_lookup(scene: Scene) -> Sample:
    """A JSON object of the budgeted length, of which one value is asked for."""
    table: dict[str, str] = {}
    length = 0
    for key, value in _facts(scene, max(1, scene.budget // 8)).items():
        if length >= scene.budget:
            break
        table[key] = value
        length += scene.size(f' "{key}": "{value}",')
    questions = [
        question(
            f'What is the value of the key "{key}" in the JSON object?',
            f'The value of the key "{key}" is',
            [table[key]],
            NIAH_TOKENS,
        )
        for key in pick(scene, list(table))
    ]
    instruction = "Memorize the values in the following JSON object. I will ask for one of them."
    return document(instruction, json.dumps(table), questions)


def _sample(scene: Scene, count: int) -> Sample:
    facts = _facts(scene, count)
    questions = [
        question(
            f"What is the special magic number for {key} that the text mentions?",
            f"The special magic number for {key} mentioned in the text is",
            [facts[key]],
            NIAH_TOKENS,
        )
        for key in pick(scene, list(facts))
    ]
    return document(_instruction(count), _haystack(scene, facts), questions)


def _instruction(count: int) -> str:
    what = "A special magic number is" if count == 1 else "Some special magic numbers are"
    which = "it" if count == 1 else "them"
    return f"{what} hidden in the following text. Memorize {which}: I will ask for {which} later."


def _haystack(scene: Scene, facts: dict[str, str]) -> str:
    return hide(scene, [f"The special magic number for {k} is {v}." for k, v in facts.items()])


def _facts(scene: Scene, count: int) -> dict[str, str]:
    """Numbers by names of two words; none of either twice."""
    rng = scene.rng
    every = range(len(COLORS) * len(_NOUNS))
    pairs = rng.sample(every, min(count, len(every)))
    keys = [f"{COLORS[pair % len(COLORS)]}-{_NOUNS[pair // len(COLORS)]}" for pair in pairs]
    return dict(zip(keys, map(str, rng.sample(_VALUES, len(keys))), strict=True))
