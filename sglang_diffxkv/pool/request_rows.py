# SPDX-License-Identifier: Apache-2.0
"""What requests asked for, by their rows of SGLang's ``ReqToTokenPool``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_diffxkv.policy.quality import Quality


class RequestRows:
    """Written when rows are given out, read with the rows of a batch.

    Attributes:
        quality: uint8 [R], `Quality` of the request that has, or had last, each row.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.quality = torch.zeros(num_rows, dtype=torch.uint8, device=device)
        self._levels = [Quality.BALANCED] * num_rows  # the same on the host
        self._asked = 0

    @property
    def asked(self) -> bool:
        """Whether any of these requests asked for another quality than the server's."""
        return self._asked > 0

    def enter(self, rows: Sequence[int], quality: Sequence[Quality]) -> None:
        """Requests of these qualities have got these rows, or keep them for their next chunk."""
        wanted = zip(rows, quality, strict=True)
        changed = [(row, level) for row, level in wanted if self._levels[row] != level]
        for row, level in changed:
            before, self._levels[row] = self._levels[row], level
            self._asked += (level != Quality.BALANCED) - (before != Quality.BALANCED)
        if changed:
            device = self.quality.device
            at, levels = zip(*changed, strict=True)
            values = torch.tensor([int(level) for level in levels], dtype=torch.uint8)
            self.quality[torch.tensor(at, device=device)] = values.to(device)
