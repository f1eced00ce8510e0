# SPDX-License-Identifier: Apache-2.0
"""The words that tasks are made of. Each is one token of the bundled model's tokenizer.

The words of filler text are split in two: the bundled model was trained on texts whose filler is of
`TRAIN`, and is evaluated on filler of `HELD_OUT`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

_LISTS = {
    kind: tuple(" ".join(lines).split())
    for kind, lines in json.loads(Path(__file__).with_name("words.json").read_text()).items()
}
NAMES, CITIES, JOBS, COLORS = (_LISTS[kind] for kind in ("names", "cities", "jobs", "colors"))
ANIMALS, THINGS, _VERBS, _ADVERBS = (
    _LISTS[kind] for kind in ("animals", "things", "verbs", "adverbs")
)
_SCENES = (*ANIMALS, *THINGS)

WORDS = tuple(dict.fromkeys((*ANIMALS, *THINGS, *COLORS, *JOBS, *NAMES, *CITIES)))
"""All that can be a key, a value or an item of a list; none twice."""


@dataclass(frozen=True)
class Vocabulary:
    """Words of filler text, which is generated when it is called."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adverbs: tuple[str, ...]

    def __call__(self, rng: Random) -> Iterator[str]:
        nouns, verbs, adverbs = self.nouns, self.verbs, self.adverbs
        while True:
            start = f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}"
            yield f"{start} {rng.choice(adverbs)}." if rng.random() < 0.5 else f"{start}."


TRAIN = Vocabulary(_SCENES[0::2], _VERBS[0::2], _ADVERBS[0::2])
HELD_OUT = Vocabulary(_SCENES[1::2], _VERBS[1::2], _ADVERBS[1::2])
EVERY = (*WORDS, *_VERBS, *_ADVERBS)
