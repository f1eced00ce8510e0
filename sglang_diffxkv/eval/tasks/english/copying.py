# SPDX-License-Identifier: Apache-2.0
"""Repeating what the context says of one name: a list in its order, or a record as JSON."""

from collections.abc import Mapping

from sglang_diffxkv.eval.tasks.base import Sample, Scene, hide, pick
from sglang_diffxkv.eval.tasks.english.base import (
    CWE_TOKENS,
    NIAH_TOKENS,
    document,
    question,
    spell,
)
from sglang_diffxkv.eval.tasks.words import CITIES, COLORS, JOBS, NAMES, THINGS

FIELDS: Mapping[str, tuple[str, ...]] = {"city": CITIES, "job": JOBS, "color": COLORS}
_ITEMS = range(4, 13)
_TOKENS_PER_LIST, _TOKENS_PER_RECORD = 128, 64
"""Of the context."""


def copy(scene: Scene) -> Sample:
    """Shopping lists in a text, one of which is to be repeated in its order."""
    rng = scene.rng
    names = rng.sample(NAMES, max(2, min(scene.budget // _TOKENS_PER_LIST, len(NAMES))))
    lists = {spell(name): ", ".join(rng.sample(THINGS, rng.choice(_ITEMS))) for name in names}
    questions = [
        question(
            f"What is on the shopping list of {name}? Name all items in their order.",
            f"The shopping list of {name} is:",
            [lists[name]],
            CWE_TOKENS,
        )
        for name in pick(scene, list(lists))
    ]
    needles = [f"The shopping list of {name} is: {items}." for name, items in lists.items()]
    instruction = "Memorize the shopping lists in the following text. I will ask for one of them."
    return document(instruction, hide(scene, needles), questions)


def record(scene: Scene) -> Sample:
    """One record, to be written as JSON."""
    return _records(scene, 1)


def records(scene: Scene) -> Sample:
    """Many records, of which a person's is to be found and written as JSON."""
    return _records(scene, max(2, min(scene.budget // _TOKENS_PER_RECORD, len(NAMES))))


def _records(scene: Scene, count: int) -> Sample:
    rng = scene.rng
    found = {
        spell(name): {field: spell(rng.choice(values)) for field, values in FIELDS.items()}
        for name in rng.sample(NAMES, count)
    }
    questions = [
        question(
            f"Write the record of {name} as a JSON object with the keys {', '.join(FIELDS)}.",
            f'{{"{next(iter(FIELDS))}":',
            list(found[name].values()),
            NIAH_TOKENS,
        )
        for name in pick(scene, list(found))
    ]
    needles = [
        f"Record of {name}: {', '.join(f'{field} = {value}' for field, value in record.items())}."
        for name, record in found.items()
    ]
    instruction = "Memorize the records of people in the following text. I will ask for one later."
    return document(instruction, hide(scene, needles), questions)
