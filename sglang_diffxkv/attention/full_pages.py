# SPDX-License-Identifier: Apache-2.0
"""When a decode step is to seal: known on the host, from the lengths alone."""

from __future__ import annotations

import math

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS

SEAL_SHARE = 1 / 8
"""Pages per running sequence that wait to be sealed until a decode step seals: each time costs some
operations a layer, each page that waits a raw page."""


class FullPages:
    """Counts the full pages of running sequences that have left their recent windows.

    Args:
        window: recent tokens that a running sequence wants to keep raw.
        needs_scores: whether a page's last token is to be scored, by the step after its own.
    """

    def __init__(self, window: int, needs_scores: bool) -> None:
        self._window = max(window, int(needs_scores))
        self._waiting = 0.0

    def expect_any(self) -> None:
        """There may be any number of them, as after a prefill: the next step is to seal."""
        self._waiting = math.inf

    def due(self, starts: torch.Tensor, ends: torch.Tensor) -> float:
        """How many have left the windows since the last time, if it is to seal now.

        Args:
            starts, ends: int64 [B] on the host, committed tokens of the running sequences before
                and after this step.

        Returns:
            0 as long as they are too few, infinity where their number is not known.
        """
        before, behind = ((x - self._window).clamp(min=0) for x in (starts, ends))
        self._waiting += int((behind // PAGE_TOKENS - before // PAGE_TOKENS).sum())
        if self._waiting < max(1, SEAL_SHARE * len(ends)):
            return 0
        due, self._waiting = self._waiting, 0.0
        return due
