# SPDX-License-Identifier: Apache-2.0
"""What is known of running requests, by their rows of SGLang's ``ReqToTokenPool``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.shared_pages import PagedSequence, paged
from sglang_diffxkv.pool.store import NotedQuality


class RunningRequest(NamedTuple):
    """A request that has a row.

    Attributes:
        step: the store's that its prompt, or the last chunk of it, ran in: all pages that it holds
            have been used in that or later.
        request: SGLang's.
    """

    quality: Quality
    step: int
    request: Any


class RequestRows:
    """Written when rows are given out and taken back, read with the rows of a batch.

    Attributes:
        quality: uint8 [R], `Quality` of the request that has, or had last, each row.
        running: requests by row.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.quality = torch.zeros(num_rows, dtype=torch.uint8, device=device)
        self.running: dict[int, RunningRequest] = {}
        self._levels = [Quality.BALANCED] * num_rows  # `quality` on the host
        self._asking: dict[int, Quality] = {}
        self._lossless_lengths: dict[int, int] = {}

    @property
    def asked(self) -> bool:
        """Whether any running request asked for another quality than the server's."""
        return bool(self._asking)

    @property
    def lossless(self) -> list[PagedSequence]:
        """Running lossless requests, as long as they are."""
        lengths = self._lossless_lengths.items()
        return [paged(self.running[row].request, length) for row, length in lengths]

    def entered_since(self, step: int) -> int:
        """The first step that somebody who runs entered in; else ``step``, the next one."""
        return min((request.step for request in self.running.values()), default=step)

    def stay(self, row: int, step: int) -> None:
        """The prompt in this row waits for its next chunk; its pages are as used in ``step``."""
        self.running[row] = self.running[row]._replace(step=step)

    def note_quality(
        self, rows: Sequence[int], starts: Sequence[int], ends: Sequence[int]
    ) -> NotedQuality:
        """Count the pages of a step by what was asked for.

        Args:
            rows: of its B requests. starts, ends: their tokens before it and after it.
        """
        opened: Counter[Quality] = Counter()
        lossless_full = 0
        for row, start, end in zip(rows, starts, ends, strict=True):
            quality = self._asking.get(row)
            if quality is None:
                continue
            opened[quality] += -(-end // PAGE_TOKENS) - -(-start // PAGE_TOKENS)
            if quality is Quality.LOSSLESS:
                lossless_full += end // PAGE_TOKENS - start // PAGE_TOKENS
                self._lossless_lengths[row] = end
        return NotedQuality(opened, lossless_full)

    def enter(self, rows: Sequence[int], requests: Sequence[RunningRequest]) -> None:
        """Requests have got these rows, or keep them for their next chunk."""
        changed = {}
        for row, request in zip(rows, requests, strict=True):
            self.running[row] = request
            if request.quality is not Quality.BALANCED:
                self._asking[row] = request.quality
            if self._levels[row] != request.quality:
                self._levels[row] = changed[row] = request.quality
        if changed:
            device = self.quality.device
            levels = torch.tensor([int(x) for x in changed.values()], dtype=torch.uint8)
            self.quality[upload(torch.tensor(list(changed)), device)] = upload(levels, device)

    def leave(self, rows: Sequence[int]) -> None:
        """These rows are free again."""
        for row in rows:
            self.running.pop(row, None)
            self._asking.pop(row, None)
            self._lossless_lengths.pop(row, None)
