# SPDX-License-Identifier: Apache-2.0
"""Records in filler text, to be written as JSON."""

import json

from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene, hide, pick
from sglang_diffxkv.eval.tasks.words import CITIES, COLORS, JOBS, NAMES

FIELDS = {"city": CITIES, "job": JOBS, "color": COLORS}
_TOKENS_PER_RECORD = 64


def record(scene: Scene) -> Sample:
    """One record, to be written as compact JSON."""
    return _sample(scene, 1)


def records(scene: Scene) -> Sample:
    """Many records, of which a person's is to be found and written as compact JSON."""
    return _sample(scene, max(2, min(scene.budget // _TOKENS_PER_RECORD, len(NAMES))))


def _sample(scene: Scene, count: int) -> Sample:
    names = scene.rng.sample(NAMES, count)
    found = {
        name: {field: scene.rng.choice(values) for field, values in FIELDS.items()}
        for name in names
    }
    needles = [
        f"Record of {name}: {', '.join(f'{field}={value}' for field, value in record.items())}."
        for name, record in found.items()
    ]
    questions = []
    for name in pick(scene, names):
        answer = json.dumps(found[name], separators=(",", ":"))
        references = tuple(found[name].values())
        questions.append(Question(f"Write the record of {name} as JSON?", answer, references))
    return Sample((("user", hide(scene, needles)),), tuple(questions))
