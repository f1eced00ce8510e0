# SPDX-License-Identifier: Apache-2.0
"""Texts that needles are hidden in, by name."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import cycle
from random import Random

from sglang_diffxkv.eval.documents.corpus import load_documents
from sglang_diffxkv.eval.tasks.base import Filler
from sglang_diffxkv.eval.tasks.words import HELD_OUT

_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_SENTENCE_CHARACTERS = range(20, 300)
_PROSE = re.compile(r"[A-Z](?!.*(::|>>>|[*=~^#-]{2})).*[.!?]")
"""A sentence without what headings and code are made of."""


def noise(rng: Random) -> Iterator[str]:
    """The few sentences that RULER repeats, after the passkey task (arXiv 2305.16300)."""
    return cycle(_NOISE)


def documentation(rng: Random) -> Iterator[str]:
    """Python's own documentation, from a random sentence on; its code is left out."""
    sentences = _documentation()
    start = rng.randrange(len(sentences))
    return cycle(sentences[start:] + sentences[:start])


@cache
def _documentation() -> tuple[str, ...]:
    text = " ".join(" ".join(document.text for document in load_documents(None)).split())
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    return tuple(
        sentence
        for sentence in sentences
        if len(sentence) in _SENTENCE_CHARACTERS and _PROSE.fullmatch(sentence)
    )


FILLERS: Mapping[str, Filler] = {
    "documentation": documentation,
    "noise": noise,
    "words": HELD_OUT,
}
