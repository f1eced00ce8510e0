# SPDX-License-Identifier: Apache-2.0
"""Which words are the most frequent: no single place of the context holds the answer."""

from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene
from sglang_diffxkv.eval.tasks.words import WORDS

_COMMON, _COMMON_SHARE = 3, 0.6
_ZIPF = 1.5
_KINDS = 24


def cwe(scene: Scene) -> Sample:
    """RULER's common words: a few occur often and equally often, all others once or twice."""
    rng = scene.rng
    common = rng.sample(WORDS, _COMMON)
    rare = rng.sample([word for word in WORDS if word not in common], len(WORDS) - _COMMON)
    each = max(2, int(scene.budget * _COMMON_SHARE / _COMMON))
    words = common * each + (rare * 4)[: max(1, scene.budget - each * _COMMON)]
    rng.shuffle(words)
    order = tuple(sorted(common, key=words.index))
    question = Question("Which three words are common?", " ".join(order), order)
    return _sample(words, question)


def fwe(scene: Scene) -> Sample:
    """RULER's frequent words: frequencies fall off as a power law; the most frequent is asked."""
    rng = scene.rng
    kinds = rng.sample(WORDS, _KINDS)
    weights = [rank**-_ZIPF for rank in range(1, _KINDS + 1)]
    words = rng.choices(kinds, weights, k=scene.budget)
    top = max(kinds, key=words.count)
    return _sample(words, Question("Which word is most frequent?", top, (top,)))


def _sample(words: list[str], question: Question) -> Sample:
    return Sample((("user", f"Words: {' '.join(words)}."),), (question,))
