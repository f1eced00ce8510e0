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
        asked: whether any request has asked for another quality than the server's, so far.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.quality = torch.zeros(num_rows, dtype=torch.uint8, device=device)
        self.asked = False

    def enter(self, rows: Sequence[int], quality: Sequence[Quality]) -> None:
        """Requests of these qualities have got these rows, or keep them for their next chunk."""
        self.asked = self.asked or any(level != Quality.BALANCED for level in quality)
        if not self.asked:
            return
        device = self.quality.device
        values = torch.tensor([int(level) for level in quality], dtype=torch.uint8, device=device)
        self.quality[torch.tensor(rows, dtype=torch.int64, device=device)] = values
