# SPDX-License-Identifier: Apache-2.0
"""Which words are the most frequent: no single place of the context holds the answer."""

from string import ascii_lowercase

from sglang_diffxkv.eval.tasks.base import Sample, Scene
from sglang_diffxkv.eval.tasks.english.base import CWE_TOKENS, FWE_TOKENS, document, question
from sglang_diffxkv.eval.tasks.words import WORDS

_COMMON = 10
_COMMON_SHARE = 0.5
"""Of the list that are common words, each as often as the others."""
_FREQUENT = 3
_ZIPF = 2.0


def cwe(scene: Scene) -> Sample:
    """RULER's common words: ten occur often in a numbered list, all others hardly ever."""
    rng = scene.rng
    mixed = rng.sample(WORDS, len(WORDS))
    common, rare = mixed[:_COMMON], mixed[_COMMON:]
    some = " ".join(f"{i}. {word}" for i, word in enumerate(rare[:64], 100))
    count = scene.budget * 64 // scene.size(some)
    each = max(2, round(_COMMON_SHARE * count / _COMMON))
    rest = max(1, count - each * _COMMON)
    words = common * each + (rare * (rest // len(rare) + 1))[:rest]
    rng.shuffle(words)
    asked = question(
        f"What are the {_COMMON} most common words in the list?",
        f"The {_COMMON} words that occur most often in the list are:",
        common,
        CWE_TOKENS,
    )
    instruction = (
        "Some words occur often in the following numbered list, others rarely. "
        "Memorize those that occur most often."
    )
    text = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    return document(instruction, text, [asked])


def fwe(scene: Scene) -> Sample:
    """RULER's frequent words: frequencies of made-up words fall off as a power law."""
    rng = scene.rng
    kinds = list(
        dict.fromkeys("".join(rng.choices(ascii_lowercase, k=6)) for _ in range(scene.budget))
    )
    count = scene.budget * 64 // scene.size(" ".join(kinds[:64]))
    total = sum(place**-_ZIPF for place in range(1, len(kinds) + 1))
    words: list[str] = []
    for place, kind in enumerate(kinds, 1):
        words += [kind] * max(1, round(count * place**-_ZIPF / total))
        if len(words) >= count:
            break
    rng.shuffle(words)
    asked = question(
        f"What are the {_FREQUENT} most frequent words in the coded text?",
        f"The {_FREQUENT} most frequent words in the coded text are:",
        kinds[:_FREQUENT],
        FWE_TOKENS,
    )
    instruction = "Keep track of how often each word occurs in the following coded text."
    return document(instruction, " ".join(words), [asked])
