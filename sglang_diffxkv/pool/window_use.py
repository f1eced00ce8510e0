# SPDX-License-Identifier: Apache-2.0
"""What SGLang's pool for layers with a sliding window holds."""

from __future__ import annotations

from typing import NamedTuple


class WindowUse(NamedTuple):
    """What the window layers' pool holds.

    Attributes:
        layers: how many.
        tokens_total, tokens_held: token slots, in whole pages.
        token_bytes: of one in all window layers.
    """

    layers: int
    tokens_total: int
    tokens_held: int
    token_bytes: int

    @property
    def bytes_total(self) -> int:
        return self.tokens_total * self.token_bytes

    @property
    def bytes_in_use(self) -> int:
        return self.tokens_held * self.token_bytes

    def report(self) -> dict[str, int]:
        """For ``/diffxkv/stats``."""
        return {
            "layers": self.layers,
            "tokens_total": self.tokens_total,
            "tokens_held": self.tokens_held,
            "bytes_total": self.bytes_total,
            "bytes_in_use": self.bytes_in_use,
        }
