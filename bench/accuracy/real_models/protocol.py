# SPDX-License-Identifier: Apache-2.0
"""What every method is asked, and what its answers are measured by. Needs torch only.

Of a document, the first part is prefilled with full attention; a method compresses what that left
in the cache, but for the last `WINDOW` tokens, which stay raw with every method. Then the document
goes on: one forward pass over the compressed cache gives a distribution after each of the tokens
that follow, to compare with that over the full cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

TARGETS = (2.5, 4.0, 6.0, 8.0)
"""Compressions that methods are set for, where they can be: 16-bit bytes over theirs."""
WINDOW = 64
"""Tokens before the continuation that stay raw."""


class Sample(NamedTuple):
    """A document in tokens: the first `prefilled`, a multiple of 64, are in the cache when the
    others come.

    Attributes:
        known: methods that have answered already, each a name and a target.
    """

    name: str
    ids: list[int]
    prefilled: int
    known: Sequence[tuple[str, float | None]] = ()

    def wants(self, name: str, target: float | None) -> bool:
        return (name, target) not in self.known

    @property
    def compressed(self) -> int:
        """Tokens that a method compresses."""
        return self.prefilled - WINDOW

    @property
    def before(self) -> torch.Tensor:
        return torch.tensor(self.ids[: self.prefilled])

    @property
    def after(self) -> torch.Tensor:
        return torch.tensor(self.ids[self.prefilled :])


class Answer(NamedTuple):
    """Of one method about one document.

    Attributes:
        kl: mean KL(full || method) of next-token distributions, nats. p99_kl: their 99th
            percentile.
        nll: mean negative log-likelihood of the document's own tokens, nats.
        agreement: share of places where the likeliest token is that of full KV.
        nbytes: of the compressed tokens, all tensors and tables counted, raw elements at 2 bytes.
    """

    kl: float
    p99_kl: float
    nll: float
    agreement: float
    nbytes: float


def measure(full: torch.Tensor, found: torch.Tensor, sample: Sample, nbytes: float) -> Answer:
    """Compare log-probabilities after each token of `sample.after`, fp32 [T, V]."""
    kl = (full.exp() * (full - found)).sum(-1)
    return Answer(
        kl=float(kl.mean()),
        p99_kl=float(kl.quantile(0.99)),
        nll=mean_nll(found, sample),
        agreement=float((full.argmax(-1) == found.argmax(-1)).float().mean()),
        nbytes=nbytes,
    )


def mean_nll(found: torch.Tensor, sample: Sample) -> float:
    """Of the document's own tokens, nats."""
    return -float(found[:-1].gather(1, sample.after[1:, None]).mean())


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    path.write_text(json.dumps([sample._asdict() for sample in samples]))


def read_samples(path: Path) -> list[Sample]:
    """What `write_samples` wrote."""
    samples = [Sample(**fields) for fields in json.loads(path.read_text())]
    return [sample._replace(known=[tuple(method) for method in sample.known]) for sample in samples]
