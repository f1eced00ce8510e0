# SPDX-License-Identifier: Apache-2.0
"""Repeating a list: every word of the answer must be found in turn."""

from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene, hide, pick
from sglang_diffxkv.eval.tasks.words import WORDS

_SHORTEST, _LONGEST = 4, 16


def copy(scene: Scene) -> Sample:
    """Named lists of distinct words in filler, one of which is to be repeated."""
    rng = scene.rng
    words = rng.sample(WORDS, len(WORDS))
    lists: dict[str, list[str]] = {}
    needles: list[str] = []
    length = 0
    while not lists or (length < scene.budget / 2 and len(words) > _LONGEST):
        name, taken = words.pop(), rng.randint(_SHORTEST, _LONGEST)
        lists[name] = [words.pop() for _ in range(taken)]
        needles.append(f"List {name}: {' '.join(lists[name])}.")
        length += scene.size(f" {needles[-1]}")
    text = hide(scene, needles)
    questions = [
        Question(f"Repeat the list {name}?", " ".join(lists[name]), (" ".join(lists[name]),))
        for name in pick(scene, list(lists))
    ]
    return Sample((("user", text),), tuple(questions))
