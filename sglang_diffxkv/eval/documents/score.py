# SPDX-License-Identifier: Apache-2.0
"""How far from full KV a policy's distributions are, over documents and along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sglang_diffxkv.eval.ask import Distribution, divergence
from sglang_diffxkv.eval.documents.passages import Passage
from sglang_diffxkv.eval.documents.read import Reading
from sglang_diffxkv.eval.estimate import Estimate, bootstrap
from sglang_diffxkv.eval.record import Record, pool_figures
from sglang_diffxkv.eval.variants import Variant

PARTS = 4
"""Of the second half, from its beginning to its end."""


class Compared(NamedTuple):
    """A policy and full KV before the same T tokens of a document; float64 [T] each.

    Attributes:
        place: from 0 to 1 in the second half.
        kl: KL(full || policy) in nats. loss, full_loss: -log p of the token, in nats.
        agrees: 1 where both find the same token likeliest, else 0.
    """

    place: np.ndarray
    kl: np.ndarray
    loss: np.ndarray
    full_loss: np.ndarray
    agrees: np.ndarray


class Figures(NamedTuple):
    """Over all tokens of all documents, with 95 % intervals."""

    perplexity: Estimate
    perplexity_ratio: Estimate
    """To full KV's on the same tokens."""
    mean_kl: Estimate
    p99_kl: Estimate
    """The 99th percentile over tokens."""
    agreement: Estimate


@dataclass(frozen=True)
class DocumentRecord(Record):
    """How far one variant is from full KV, in one way to read documents."""

    tokens: int
    """That were compared, of all documents."""
    whole: Figures
    parts: list[Figures]
    """Of each quarter of the second half."""


def compare(passage: Passage, full: Reading, other: Reading) -> Compared:
    """`other` beside `full`, of the same tokens of `passage`."""
    return Compared(
        place=(full.places - passage.half) / (len(passage.ids) - passage.half),
        kl=np.array([divergence(a, b) for a, b in zip(_listed(full), _listed(other), strict=True)]),
        loss=-other.logprobs.astype(np.float64),
        full_loss=-full.logprobs.astype(np.float64),
        agrees=(full.top_ids[:, 0] == other.top_ids[:, 0]).astype(np.float64),
    )


def _listed(reading: Reading) -> list[Distribution]:
    pairs = zip(reading.top_ids.tolist(), reading.top_logprobs.tolist(), strict=True)
    return [dict(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]


def score(
    variant: Variant,
    task: str,
    length: int,
    compared: Sequence[Compared],
    stats: Sequence[dict[str, Any]],
) -> DocumentRecord:
    """The record of the documents in `compared`; `stats` are the pool's, none of SGLang's own."""
    return DocumentRecord(
        policy=variant.name,
        target=variant.target,
        task=task,
        length=length,
        documents=len(compared),
        tokens=sum(len(document.kl) for document in compared),
        whole=figures(compared),
        parts=[figures([_part(document, i) for document in compared]) for i in range(PARTS)],
        **pool_figures(stats),
    )


def _part(document: Compared, number: int) -> Compared:
    inside = (document.place * PARTS).astype(int) == number
    return Compared(*(values[inside] for values in document))


def figures(documents: Sequence[Compared]) -> Figures:
    """Figures of documents, which have about as many tokens each."""
    kl = [document.kl for document in documents]
    loss = [document.loss for document in documents]
    more = [document.loss - document.full_loss for document in documents]
    return Figures(
        perplexity=bootstrap(loss, _perplexity),
        perplexity_ratio=bootstrap(more, _perplexity),
        mean_kl=bootstrap(kl, np.mean),
        p99_kl=bootstrap(kl, _p99),
        agreement=bootstrap([document.agrees for document in documents], np.mean),
    )


def _perplexity(loss: np.ndarray) -> float:
    return float(np.exp(loss.mean()))


def _p99(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.99))
