# SPDX-License-Identifier: Apache-2.0
"""States of some pages as the host sees them, read from the directory in one go."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from sglang_diffxkv.kernels.gpu.transfer import Download
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.directory import PageDirectory
from sglang_diffxkv.pool.ledger import OpenShare, Share

Bools = np.ndarray[tuple[int], np.dtype[np.bool_]]


def read_states(directory: PageDirectory, pages: torch.Tensor) -> Download:
    """What `PageStates` takes, of ``pages`` (int64 [N]) as they are at this point of the stream."""
    d = directory
    columns = (
        d.raw_slot,
        d.sealed,
        d.on_host,
        d.demotions,
        d.num_frames,
        d.quality,
        d.plan,
        d.filled,
    )
    return Download(torch.stack([column[pages].int() for column in columns]))


class PageStates:
    """Of N pages.

    Attributes:
        is_open, sealed, on_host: bool [N]. None of them: it is free.
    """

    def __init__(self, read: Download) -> None:
        """``read``: from `read_states`; waited for, if it is not here yet."""
        table = read.values().numpy()
        slot, sealed, on_host, demotions, self._frames, self._quality = table[:6]
        self._plan, self._filled = table[6:]
        self.is_open: Bools = slot >= 0
        self.sealed: Bools = sealed != 0
        self.on_host: Bools = on_host != 0
        self._demoted: Bools = demotions != 0

    def open_share(self) -> OpenShare:
        lossless = self._quality == Quality.LOSSLESS
        full = self._filled == PAGE_TOKENS
        return OpenShare(
            pages=int(self.is_open.sum()),
            full=int((self.is_open & full & ~lossless).sum()),
            never_compressed=int((self.is_open & lossless).sum()),
            tokens=int(self._filled[self.is_open].sum()),
        )

    @property
    def in_use(self) -> Bools:
        return self.is_open | self.sealed | self.on_host

    def sealed_share(self, demoted: bool) -> Share:
        """Of sealed pages that have been demoted, or of those that have not."""
        return self._share(self.sealed & (self._demoted == demoted))

    def host_share(self, demoted: bool) -> Share:
        """The same of pages on the host."""
        return self._share(self.on_host & (self._demoted == demoted))

    def _share(self, chosen: Bools) -> Share:
        return Share(int(chosen.sum()), int(self._frames[chosen].sum()))

    def by_quality(self) -> Counter[Quality]:
        return Counter(map(Quality, self._quality.tolist()))

    def by_plan(self) -> Counter[int]:
        """Sealed pages, and those on the host, by the number of their plan."""
        return Counter(self._plan[self.sealed | self.on_host].tolist())
