# SPDX-License-Identifier: Apache-2.0
"""How far from full KV a policy's distributions are, over documents and along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sglang_diffxkv.eval.ask import Distribution, divergence
from sglang_diffxkv.eval.documents.passages import Passage
from sglang_diffxkv.eval.documents.read import Reading
from sglang_diffxkv.eval.score import Estimate, pool_figures
from sglang_diffxkv.eval.variants import Variant

PARTS = 4
"""Of the second half, from its beginning to its end."""
_RESAMPLES = 500


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


class DocumentRow(NamedTuple):
    """One policy on one way to read documents of one length; `None` is for what does not apply."""

    policy: str
    target: float | None
    task: str
    length: int
    documents: int
    tokens: int
    """That were compared, of all documents."""
    whole: Figures
    parts: list[Figures]
    """Of each quarter of the second half."""
    physical_compression: float
    kept_high: float | None
    kept_low: float | None
    pruned: float | None
    sealed: float | None
    under_pressure: int


def compare(passage: Passage, full: Reading, other: Reading) -> Compared:
    """`other` beside `full`, of the same tokens of `passage`."""
    return Compared(
        place=(full.places - passage.half) / (len(passage.ids) - passage.half),
        kl=np.array([divergence(a, b) for a, b in zip(_rows(full), _rows(other), strict=True)]),
        loss=-other.logprobs.astype(np.float64),
        full_loss=-full.logprobs.astype(np.float64),
        agrees=(full.top_ids[:, 0] == other.top_ids[:, 0]).astype(np.float64),
    )


def _rows(reading: Reading) -> list[Distribution]:
    pairs = zip(reading.top_ids.tolist(), reading.top_logprobs.tolist(), strict=True)
    return [dict(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]


def score(
    variant: Variant,
    task: str,
    length: int,
    compared: Sequence[Compared],
    stats: Sequence[dict[str, Any]],
) -> DocumentRow:
    """The row of the documents in `compared`; `stats` are the pool's, none of SGLang's own."""
    return DocumentRow(
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


def bootstrap(documents: Sequence[np.ndarray], statistic: Callable[[np.ndarray], Any]) -> Estimate:
    """`statistic` of all values, with the interval of its values over documents drawn anew.

    Tokens of one document are not independent, so documents are drawn, whole.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(documents), size=(_RESAMPLES, len(documents)))
    found = [statistic(np.concatenate([documents[i] for i in row])) for row in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(float(statistic(np.concatenate(documents))), float(low), float(high))
