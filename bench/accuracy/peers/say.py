# SPDX-License-Identifier: Apache-2.0
"""How a peer's process tells what it has found: a line of JSON for every answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version

from bench.accuracy.real_models.protocol import Answer, Sample


def say(
    sample: Sample, packages: Sequence[str], name: str, target: float | None, answer: Answer
) -> None:
    said = {
        "document": sample.name,
        "packages": {name: version(name) for name in packages},
        "name": name,
        "target": target,
        "answer": answer._asdict(),
    }
    print(json.dumps(said), flush=True)
