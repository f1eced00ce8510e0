# SPDX-License-Identifier: Apache-2.0
"""A document whose tokens are read back as the formats of their tiers leave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench.accuracy.fake_quantization import Side, token_bytes
from bench.accuracy.real_models.ours import ModelShape
from bench.accuracy.real_models.protocol import Sample, measure
from bench.accuracy.real_models.reader import LayerPrefix, Prefix, Reader
from bench.accuracy.real_models.tiers.bases import Reads
from bench.accuracy.real_models.tiers.oracle import importances, reread
from sglang_diffxkv.kernels.layout import TierFormat
from sglang_diffxkv.pool.key_means import SINKS

RAW, PRUNED = -1, 0
"""Codes of tokens; those from 1 on are the tiers', best first."""


class Case(NamedTuple):
    """A way to choose tiers.

    Attributes:
        tiers: best first; pruned is always one more.
        loss: of a token in each, in shares of what pruning it does.
    """

    importance: str
    tiers: tuple[TierFormat, ...]
    loss: tuple[float, ...]


class Answer(NamedTuple):
    """About one document.

    Attributes:
        compression: dense bf16 bytes of the compressed tokens over those in their tiers; a page
            store adds the ends of frames, and its tables.
    """

    kl: float
    agreement: float
    compression: float


class Document:
    """A document that is compressed in many ways.

    Attributes:
        name: of the sample.
        states: of its first part.
        importances: fp32 [L, H, n] by name.
    """

    def __init__(self, reader: Reader, sample: Sample, request: torch.Tensor) -> None:
        self.states, again = reread(reader, sample.before, request)
        self.importances = importances(self.states, again)
        self.name = sample.name
        self._reader, self._sample = reader, sample
        self._shape = ModelShape.of(reader.model.config)
        self._dense = sample.compressed * self._shape.token_bytes
        exact = zip(self.states.keys, self.states.values, strict=True)
        self._full = self._go_on([LayerPrefix(*layer) for layer in exact])

    def ask(self, case: Case, target: float, reads: Reads) -> Answer:
        """With the tiers that cost least at this compression; the first tokens are in the best."""
        nbytes = torch.tensor([0.0, *map(self._token_bytes, case.tiers)], dtype=torch.float64)
        loss = torch.tensor([1.0, *case.loss], dtype=torch.float64)
        importance = self.importances[case.importance][..., : self._sample.compressed]
        codes = torch.ones(importance.shape, dtype=torch.int64)
        budget = self._dense / target - codes[..., :SINKS].numel() * float(nbytes[1])
        codes[..., SINKS:] = choose(importance[..., SINKS:], loss, nbytes, budget)
        return self._answer(codes, case.tiers, reads, float(nbytes[codes].sum()))

    def ask_uniform(self, tier: TierFormat, reads: Reads) -> Answer:
        """With all tokens in one format but the first, which stay raw and are counted likewise."""
        shape = self._shape.layers, self._shape.kv_heads, self._sample.compressed
        codes = torch.ones(shape, dtype=torch.int64)
        codes[..., :SINKS] = RAW
        return self._answer(codes, [tier], reads, codes.numel() * self._token_bytes(tier))

    def _token_bytes(self, tier: TierFormat) -> float:
        return token_bytes(tier, Side(), Side(), self._shape.head_dim)

    def _go_on(self, prefix: Prefix) -> torch.Tensor:
        sample = self._sample
        return self._reader.log_probabilities(sample.after, sample.prefilled, prefix)

    def _answer(
        self, codes: torch.Tensor, tiers: Sequence[TierFormat], reads: Reads, nbytes: float
    ) -> Answer:
        prefix = read_back(self.states.keys, self.states.values, codes, tiers, reads)
        got = measure(self._full, self._go_on(prefix), self._sample, nbytes)
        return Answer(got.kl, got.agreement, self._dense / nbytes)


def choose(
    importance: torch.Tensor, loss: torch.Tensor, nbytes: torch.Tensor, budget: float
) -> torch.Tensor:
    """Codes, int64 [...], of the least sum of importance times loss within `budget` bytes.

    Each token takes what is cheapest at one price per byte, which bisection finds: no choice of as
    many bytes loses less.

    Args:
        importance: [...] of tokens, not negative.
        loss, nbytes: fp64 [T], of a token by code.
    """
    damage = (importance / importance.mean()).double()[..., None] * loss
    low, high = -100.0, 100.0  # log2 of the price
    for _ in range(60):
        price = (low + high) / 2
        spent = nbytes[(damage + 2.0**price * nbytes).argmin(-1)].sum()
        low, high = (price, high) if spent > budget else (low, price)
    return (damage + 2.0**high * nbytes).argmin(-1)


def read_back(
    keys: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    tiers: Sequence[TierFormat],
    reads: Reads,
) -> Prefix:
    """The prompt with its first m tokens as `codes` ([L, H, m]) have them, the others raw.

    Args:
        keys, values: fp32 [L, H, n, D].
    """
    keys, values, end = keys.clone(), values.clone(), codes.shape[2]
    for code, tier in enumerate(tiers, 1):
        mine = (codes == code)[..., None]
        for rows, read in (
            (keys, reads.keys[tier.key_bits]),
            (values, reads.values[tier.value_bits]),
        ):
            rows[:, :, :end] = torch.where(mine, read[:, :, :end], rows[:, :, :end])
    kept = torch.ones(keys.shape[:3], dtype=torch.bool)
    kept[:, :, :end] = codes != PRUNED
    masks = (None if bool(mask.all()) else mask for mask in kept)
    return [LayerPrefix(*layer) for layer in zip(keys, values, masks, strict=True)]
