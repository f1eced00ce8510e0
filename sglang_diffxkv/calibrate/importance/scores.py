# SPDX-License-Identifier: Apache-2.0
"""Attention as transformers' models ask for it: windows, soft caps and sinks included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

QUERIES_AT_ONCE = 256


class Scoring(NamedTuple):
    """How a layer turns the products of queries and keys into weights.

    Attributes:
        scale: factor of q.k.
        window: tokens that a query sees, itself included; None: all before it.
        cap: of scores, by tanh; None: there is none.
        sinks: [Hq], logits that take weight and give nothing; None: there are none.
    """

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def asked(cls, head_dim: int, scaling: float | None, options: dict[str, Any]) -> Scoring:
        """By the arguments of transformers' attention functions."""
        scale = head_dim**-0.5 if scaling is None else scaling
        return cls(
            scale, options.get("sliding_window"), options.get("softcap"), options.get("s_aux")
        )

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.cap is None and self.sinks is None

    def attention(self, q: torch.Tensor, keys: torch.Tensor) -> Iterator[torch.Tensor]:
        """Weights that the last S queries [Hq, S, D] give to `keys` [H, N, D], causally.

        Yields:
            fp32 [H, Hq / H, s, N] of up to `QUERIES_AT_ONCE` queries at a time.
        """
        heads, total, _ = keys.shape
        place = torch.arange(total, device=q.device)
        grouped = q.float().unflatten(0, (heads, -1))
        for first in range(0, q.shape[1], QUERIES_AT_ONCE):
            part = grouped[:, :, first : first + QUERIES_AT_ONCE]
            own = total - q.shape[1] + first + torch.arange(part.shape[2], device=q.device)
            scores = part @ keys.float()[:, None].transpose(-1, -2) * self.scale
            if self.cap is not None:
                scores = torch.tanh(scores / self.cap) * self.cap
            behind = own[:, None] - place
            hidden = behind < 0
            if self.window is not None:
                hidden |= behind >= self.window
            yield self._softmax(scores.masked_fill(hidden, -torch.inf))

    def _softmax(self, scores: torch.Tensor) -> torch.Tensor:
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float().view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
