# SPDX-License-Identifier: Apache-2.0
"""Bases in which keys and values are quantized: Hadamard's, and those learnt from a model's states.

OSCAR (arXiv 2605.17757) rotates keys by the eigenvectors of the queries' second moments and values
by those of their own, weighted by how much queries look for their keys, both times Hadamard; here
per layer and KV head. The permutation that follows in its code matters only to groups within a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bench.accuracy.fake_quantization import Side, quantized
from bench.accuracy.real_models.reader import States
from sglang_diffxkv.kernels.basis.rotation import hadamard
from sglang_diffxkv.kernels.layout import TierFormat
from sglang_diffxkv.kernels.pack.quantize import CLIP
from sglang_diffxkv.pool.key_means import LEAST_RATIO, SINKS

_LEAST = 1e-6
"""Of the largest eigenvalue, below which a direction counts as never used."""


class Basis(NamedTuple):
    """Maps fp32 [L, H, D, D] that rows of keys, and of values, are multiplied by."""

    keys: torch.Tensor
    values: torch.Tensor


class Reads(NamedTuple):
    """What keys and values [L, H, n, D] are read back as, by bits."""

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]


def read(states: States, basis: Basis, tiers: Sequence[TierFormat]) -> Reads:
    """Keys without their means, and values, quantized in `basis` by the code's own clips.

    Args:
        tiers: best first; the first tells which means are worth keeping.
    """
    mean = key_mean(states.keys, LEAST_RATIO[tiers[0].key_bits])
    centred = states.keys - mean
    key_bits = {tier.key_bits for tier in tiers}
    value_bits = {tier.value_bits for tier in tiers}
    return Reads(
        {bits: _through(basis.keys, centred, bits) + mean for bits in key_bits},
        {bits: _through(basis.values, states.values, bits) for bits in value_bits},
    )


def _through(basis: torch.Tensor, rows: torch.Tensor, bits: int) -> torch.Tensor:
    inverse = torch.linalg.inv(basis.double()).float()
    return quantized(rows @ basis, bits, Side(CLIP[bits])) @ inverse


def key_mean(keys: torch.Tensor, least_ratio: float) -> torch.Tensor:
    """[L, H, 1, D] as `pool.key_means` has it; 0 for heads that are better off without."""
    tokens = keys[..., SINKS:, :]
    mean = tokens.mean(-2, keepdim=True)
    rest = tokens.var(-2, correction=0, keepdim=True).sum(-1, keepdim=True)
    return mean * (mean.square().sum(-1, keepdim=True) > least_ratio**2 * rest)


def hadamard_basis(states: States) -> Basis:
    """Hadamard's, which needs no statistics; D is a power of two."""
    layers, heads, _, dim = states.keys.shape
    matrix = hadamard(dim, torch.float32, states.keys.device).expand(layers, heads, -1, -1)
    return Basis(matrix, matrix)


def learnt(samples: Sequence[States]) -> dict[str, Basis]:
    """By name, from documents that are not measured; Hadamard's first."""
    start = hadamard_basis(samples[0])
    rotation = start.keys
    queries = _mean_of(samples, _query_moments)
    values = _mean_of(samples, lambda states: _moments(states.values[..., SINKS:, :]))
    weighted = _mean_of(samples, lambda states: _moments(_weighted_values(states, queries)))
    keys = _mean_of(samples, _key_covariance)
    return {
        "Hadamard": start,
        "keys: OSCAR": start._replace(keys=_eigenvectors(queries) @ rotation),
        "keys: balanced": start._replace(keys=_balancing(keys, queries) @ rotation),
        "values: eigenvectors": start._replace(values=_eigenvectors(values) @ rotation),
        "values: OSCAR": start._replace(values=_eigenvectors(weighted) @ rotation),
    }


def _mean_of(samples: Sequence[States], moments: Callable[[States], torch.Tensor]) -> torch.Tensor:
    """fp64 [L, H, D, D], documents weighted by their tokens."""
    tokens = [states.keys.shape[2] for states in samples]
    parts = (moments(states) * n for states, n in zip(samples, tokens, strict=True))
    return torch.stack(list(parts)).sum(0) / sum(tokens)


def _moments(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    return rows.mT @ rows / rows.shape[-2]


def _query_moments(states: States) -> torch.Tensor:
    """Of all query heads of a KV head."""
    return _moments(states.queries.unflatten(1, (states.keys.shape[1], -1)).flatten(2, 3))


def _key_covariance(states: States) -> torch.Tensor:
    return _moments((states.keys - key_mean(states.keys, 1.0))[..., SINKS:, :])


def _weighted_values(states: States, queries: torch.Tensor) -> torch.Tensor:
    keys, values = states.keys[..., SINKS:, :].double(), states.values[..., SINKS:, :]
    weights = ((keys @ queries) * keys).sum(-1, keepdim=True)
    return values * (weights / weights.mean(-2, keepdim=True)).sqrt()


def _eigenvectors(moments: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigh(moments).eigenvectors.float()


def _balancing(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The symmetric map B with B keys B = B^-1 queries B^-1.

    Of all bases it has the least error of scores, if the noise of codes is the same in every
    direction and grows with the length of a row.
    """
    root, inverse = _power(keys, 0.5), _power(keys, -0.5)
    square = inverse @ _power(root @ queries @ root, 0.5) @ inverse
    return _power(square, 0.5).float()


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Of symmetric positive matrices fp64 [..., D, D]."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values = values.clamp(min=values.amax(-1, keepdim=True) * _LEAST)
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT
