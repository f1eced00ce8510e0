# SPDX-License-Identifier: Apache-2.0
"""Answers by method and document, kept in a file from run to run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.accuracy.real_models.protocol import Answer, Sample

FAMILIES = OURS, PEERS, LLAMA = "ours", "peers", "llama.cpp"


@dataclass
class Row:
    """One method; `answers` by document."""

    family: str
    name: str
    target: float | None
    answers: dict[str, Answer] = field(default_factory=dict)


@dataclass
class Results:
    """All that is known.

    Attributes:
        asked: hash of what each document asks of which model.
        tokens: of each document, those compressed. token_bytes: of one of them in 16 bit.
        full: mean negative log-likelihood with full KV, nats, by document.
        packages: versions of the peers'.
        alphas: high and low thresholds that were found for `diffkv`, by target.
    """

    asked: dict[str, str]
    token_bytes: int
    tokens: dict[str, int]
    full: dict[str, float] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    alphas: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(
        self, family: str, name: str, target: float | None, document: str, answer: Answer
    ) -> None:
        for row in self.rows:
            if (row.family, row.name, row.target) == (family, name, target):
                break
        else:
            row = Row(family, name, target)
            self.rows.append(row)
        row.answers[document] = answer

    def forget(self, family: str) -> None:
        self.rows = [row for row in self.rows if row.family != family]

    def known(self, family: str, document: str) -> list[tuple[str, float | None]]:
        """Methods of it that have answered about a document: names and targets."""
        return [
            (row.name, row.target)
            for row in self.rows
            if row.family == family and document in row.answers
        ]

    def to_json(self) -> dict[str, object]:
        fields = asdict(self)
        for row in fields["rows"]:
            row["answers"] = {
                document: {key: float(f"{x:.6g}") for key, x in answer._asdict().items()}
                for document, answer in row["answers"].items()
            }
        return fields


def fingerprint(model: str, sample: Sample) -> str:
    return hashlib.sha256(json.dumps([model, sample[:3]]).encode()).hexdigest()[:16]


def load(path: Path, new: Results) -> Results:
    """`new`, with what the file at `path` knows of the same documents and model."""
    if not path.exists():
        return new
    fields = json.loads(path.read_text())["results"]
    same = {name for name, asked in new.asked.items() if fields["asked"].get(name) == asked}
    new.packages = fields["packages"]
    new.alphas = fields.get("alphas", {})
    new.full = {name: nll for name, nll in fields["full"].items() if name in same}
    for row in fields["rows"]:
        for name, answer in row["answers"].items():
            if name in same:
                new.add(row["family"], row["name"], row["target"], name, Answer(**answer))
    return new
