# SPDX-License-Identifier: Apache-2.0
"""Needles in a haystack: facts with a key and a value, few among filler or many without any."""

from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene, hide, pick
from sglang_diffxkv.eval.tasks.words import WORDS

_TOKENS_PER_NEEDLE = 48
"""Of the context, where there are several."""
_QUERIES = 3


def niah_single(scene: Scene) -> Sample:
    """One needle: the passkey task."""
    return _sample(scene, _facts(scene, 1))


def niah_multikey(scene: Scene) -> Sample:
    """Many needles of one form, of which one is asked for."""
    return _sample(scene, _facts(scene, _count(scene)))


def niah_multiquery(scene: Scene) -> Sample:
    """Many needles, of which several are asked for at once."""
    facts = _facts(scene, _count(scene))
    questions = []
    for keys in _triples(scene, list(facts)):
        text = f"What are the codes of {', '.join(keys[:-1])} and {keys[-1]}?"
        answer = ", ".join(f"{key} is {facts[key]}" for key in keys)
        questions.append(Question(text, answer, tuple(facts[key] for key in keys)))
    return Sample((("user", _haystack(scene, facts)),), tuple(questions))


def kv_lookup(scene: Scene) -> Sample:
    """Nothing but needles: a table of keys and values, as long as its keys last."""
    keys = scene.rng.sample(WORDS, len(WORDS))
    table: dict[str, str] = {}
    length = scene.size(" Table:")
    for key in keys:
        if length >= scene.budget:
            break
        table[key] = scene.rng.choice(WORDS)
        length += scene.size(f" {key} = {table[key]},")
    pairs = ", ".join(f"{key} = {value}" for key, value in table.items())
    questions = [
        Question(f"What is the value of {key}?", table[key], (table[key],))
        for key in pick(scene, list(table))
    ]
    return Sample((("user", f"Table: {pairs}."),), tuple(questions))


def _triples(scene: Scene, keys: list[str]) -> list[tuple[str, ...]]:
    """Up to as many different selections of keys as questions are to be asked."""
    size = min(_QUERIES, len(keys))
    drawn = [tuple(scene.rng.sample(keys, size)) for _ in range(scene.questions)]
    return list(dict.fromkeys(drawn))


def _count(scene: Scene) -> int:
    return max(2, min(scene.budget // _TOKENS_PER_NEEDLE, len(WORDS)))


def _facts(scene: Scene, count: int) -> dict[str, str]:
    keys = scene.rng.sample(WORDS, count)
    return {key: scene.rng.choice(WORDS) for key in keys}


def _haystack(scene: Scene, facts: dict[str, str]) -> str:
    return hide(scene, [f"The code of {key} is {value}." for key, value in facts.items()])


def _sample(scene: Scene, facts: dict[str, str]) -> Sample:
    questions = [
        Question(f"What is the code of {key}?", facts[key], (facts[key],))
        for key in pick(scene, list(facts))
    ]
    return Sample((("user", _haystack(scene, facts)),), tuple(questions))
