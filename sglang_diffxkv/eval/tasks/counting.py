# SPDX-License-Identifier: Apache-2.0
"""Which words are the most frequent: no single place of the context holds the answer."""

from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene
from sglang_diffxkv.eval.tasks.words import WORDS

_COMMON = (0.3, 0.2, 0.1)
"""Shares of the text that are the common words. RULER has them equally frequent; here they differ,
so that their order, and with it the exact answer, is determined."""
_ZIPF = 1.5
_KINDS = 24


def cwe(scene: Scene) -> Sample:
    """RULER's common words: a few occur often, all others a few times at most."""
    rng = scene.rng
    count = _words(scene)
    mixed = rng.sample(WORDS, len(WORDS))
    common, rare = tuple(mixed[: len(_COMMON)]), mixed[len(_COMMON) :]
    words = [
        word
        for word, share in zip(common, _COMMON, strict=True)
        for _ in range(max(2, round(count * share)))
    ]
    rest = max(1, count - len(words))
    words += (rare * (rest // len(rare) + 1))[:rest]
    rng.shuffle(words)
    question = Question("Which three words are common?", " ".join(common), common)
    return _sample(words, question)


def fwe(scene: Scene) -> Sample:
    """RULER's frequent words: frequencies fall off as a power law; the most frequent is asked."""
    rng = scene.rng
    kinds = rng.sample(WORDS, _KINDS)
    weights = [place**-_ZIPF for place in range(1, _KINDS + 1)]
    words = rng.choices(kinds, weights, k=_words(scene))
    top = max(kinds, key=words.count)
    return _sample(words, Question("Which word is most frequent?", top, (top,)))


def _words(scene: Scene) -> int:
    """Words that fill the budget."""
    some = scene.rng.sample(WORDS, 64)
    return scene.budget * len(some) // scene.size(f" {' '.join(some)}")


def _sample(words: list[str], question: Question) -> Sample:
    return Sample((("user", f"Words: {' '.join(words)}."),), (question,))
