# SPDX-License-Identifier: Apache-2.0
"""How a peer's process tells what it has found: a line of JSON for every document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from bench.accuracy.real_models.protocol import Answer, Sample


def say(
    sample: Sample, packages: Sequence[str], answers: Iterable[tuple[str, float | None, Answer]]
) -> None:
    """Print all answers about one document: name, target, and figures of each."""
    said = {
        "document": sample.name,
        "answers": [[name, target, answer._asdict()] for name, target, answer in answers],
        "packages": {name: version(name) for name in packages},
    }
    print(json.dumps(said), flush=True)
