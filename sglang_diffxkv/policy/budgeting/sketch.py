# SPDX-License-Identifier: Apache-2.0
"""How importance is distributed in each layer and KV head, as histograms that fade with time.

XKV (arXiv 2412.05896) measures this (DDID) by a mini-prefill of sampled prompts; here it is a
by-product of sealing, whose importances are there anyway. Updates run on the device without
synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sglang_diffxkv.kernels.gpu.transfer import Download, upload

BINS_PER_OCTAVE = 8
OCTAVES = 14
"""To either side of uniform attention, 1 / N; what lies beyond goes to the outermost bins."""
BINS = 2 * BINS_PER_OCTAVE * OCTAVES
HALF_LIFE_TOKENS = 2**20
"""Of the weight of a token, in tokens sketched after it."""


class ImportanceSketch:
    """Counts and sums of importance by layer, KV head and bin; `empty` makes one.

    Attributes:
        tokens: float32 [L, H, BINS], tokens whose importance is in the bin.
        mass: float32 [L, H, BINS], sum of their importances in units of uniform attention (1 / N).
    """

    def __init__(self, tokens: torch.Tensor, mass: torch.Tensor) -> None:
        self.tokens, self.mass = tokens, mass

    @classmethod
    def empty(
        cls, num_layers: int, num_kv_heads: int, device: str | torch.device
    ) -> ImportanceSketch:
        shape = (num_layers, num_kv_heads, BINS)
        return cls(torch.zeros(shape, device=device), torch.zeros(shape, device=device))

    @staticmethod
    def nbytes_of(num_layers: int, num_kv_heads: int) -> int:
        """Bytes of one for such a model."""
        return 2 * num_layers * num_kv_heads * BINS * torch.float32.itemsize

    def update(self, importance: torch.Tensor, counted: torch.Tensor) -> None:
        """Let older tokens fade, and add those of S pages.

        Args:
            importance: float32 [S, L, H, 64], in units of uniform attention, finite.
            counted: bool [S, 64], the tokens to add.
        """
        fade = math.exp2(-counted.numel() / HALF_LIFE_TOKENS)
        values = importance.permute(1, 2, 0, 3).flatten(-2)  # [L, H, S * 64]
        weight = counted.flatten().to(values.dtype).expand_as(values)
        bins = bin_of(values)
        self.tokens.mul_(fade).scatter_add_(-1, bins, weight)
        self.mass.mul_(fade).scatter_add_(-1, bins, values * weight)

    def to(self, device: torch.device) -> None:
        """Move it."""
        if self.tokens.device != device:
            self.tokens, self.mass = upload(self.tokens, device), upload(self.mass, device)

    def copy(self) -> ImportanceSketch:
        """The sketch as it is now, on the host."""
        return self.taken()()

    def taken(self) -> Callable[[], ImportanceSketch]:
        """A call that gives `copy` as of now, and waits for the device, in whatever thread."""
        downloads = [Download(x.clone()) for x in (self.tokens, self.mass)]
        return lambda: ImportanceSketch(*(x.values() for x in downloads))

    def of_heads(self, heads: slice) -> ImportanceSketch:
        """That of some KV heads of every layer."""
        return ImportanceSketch(self.tokens[:, heads], self.mass[:, heads])

    def difference(self, other: ImportanceSketch) -> float:
        """Share of importance that lies elsewhere: total variation, mean over layers, 0 to 1.

        By octaves: single bins differ between samples of the same traffic.
        """
        octaves = (x.mass.unflatten(-1, (-1, BINS_PER_OCTAVE)).sum(-1) for x in (self, other))
        ours, theirs = (x.flatten(1) / x.sum((1, 2)).clamp(min=1e-30)[:, None] for x in octaves)
        return float((ours - theirs).abs().sum(1).mean() / 2)

    def to_json(self) -> dict[str, Any]:
        """Non-empty bins: ``[layer, head, bin, tokens, mass]`` each."""
        where = self.tokens.nonzero()
        filled = zip(
            where.tolist(),
            self.tokens[tuple(where.T)].tolist(),
            self.mass[tuple(where.T)].tolist(),
            strict=True,
        )
        bins = [[*place, float(f"{n:.6g}"), float(f"{mass:.6g}")] for place, n, mass in filled]
        return {"layers": len(self.tokens), "kv_heads": self.tokens.shape[1], "bins": bins}

    @classmethod
    def from_json(cls, found: dict[str, Any], device: str | torch.device) -> ImportanceSketch:
        """Inverse of `to_json`, to six digits.

        Raises:
            ValueError, KeyError, TypeError, IndexError: `found` is not what `to_json` writes.
        """
        sketch = cls.empty(int(found["layers"]), int(found["kv_heads"]), "cpu")
        for *where, tokens, mass in found["bins"]:
            layer, head, bin_ = where
            if min(where) < 0 or not (0 < tokens < math.inf and 0 <= mass < math.inf):
                raise ValueError(f"bin {where} holds {tokens} tokens and {mass} importance")
            sketch.tokens[layer, head, bin_] = tokens
            sketch.mass[layer, head, bin_] = mass
        sketch.to(torch.device(device))
        return sketch


def bin_of(importance: torch.Tensor) -> torch.Tensor:
    """int64 bins of importances in units of uniform attention, any shape."""
    octave = importance.clamp(min=2.0 ** -(OCTAVES + 1)).log2()
    return ((octave + OCTAVES) * BINS_PER_OCTAVE).floor().long().clamp_(0, BINS - 1)
