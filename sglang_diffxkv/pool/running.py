# SPDX-License-Identifier: Apache-2.0
"""What is known of running requests, by their ``req_pool_index`` in SGLang's ReqToTokenPool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.committed import AskedPages, Committed
from sglang_diffxkv.pool.shared_pages import PagedSequence, paged


@dataclass
class RunningRequest:
    """A request that has a ``req_pool_index``.

    Attributes:
        step: the one that its prompt, or the last chunk of it, ran in: all pages that it holds have
            been used in that or later.
        request: SGLang's.
        tokens: that are committed, as the ledger has counted them; 0 before its first step.
    """

    quality: Quality
    step: int
    request: Any
    tokens: int = 0


class RunningRequests:
    """Told when SGLang gives ``req_pool_index``es out and takes them back.

    Attributes:
        by_index: requests by ``req_pool_index``.
    """

    def __init__(self) -> None:
        self.by_index: dict[int, RunningRequest] = {}
        self._asking: dict[int, RunningRequest] = {}

    @property
    def lossless(self) -> list[PagedSequence]:
        """Running lossless requests that have pages, as long as they are."""
        asking = self._asking.values()
        lossless = [x for x in asking if x.quality is Quality.LOSSLESS and x.tokens]
        return [paged(x.request, x.tokens) for x in lossless]

    def entered_since(self, step: int) -> int:
        """The first step that somebody who runs entered in; else ``step``, the next one."""
        return min((request.step for request in self.by_index.values()), default=step)

    def stay(self, index: int, step: int) -> None:
        """A prompt waits for its next chunk; its pages are as used in ``step``."""
        self.by_index[index].step = step

    def commit(
        self, indices: Sequence[int], starts: Sequence[int], ends: Sequence[int]
    ) -> Committed:
        """Note how many tokens requests have for good, of B requests.

        Args:
            indices: their ``req_pool_index``. starts: tokens before their first step, those of a
                prefix that others have computed. ends: committed tokens.
        """
        before: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        quality: list[Quality] = []
        lossless_full = 0
        for index, first, end in zip(indices, starts, ends, strict=True):
            request, start = self.by_index.get(index), first
            if request is not None:
                start, request.tokens = request.tokens or first, end
            before.append(start)
            if request is None or request.quality is Quality.BALANCED:
                continue
            opening = range(-(-start // PAGE_TOKENS) * PAGE_TOKENS, end, PAGE_TOKENS)
            rows += [index] * len(opening)
            positions += opening
            quality += [request.quality] * len(opening)
            if request.quality is Quality.LOSSLESS:
                lossless_full += end // PAGE_TOKENS - start // PAGE_TOKENS
        asked = AskedPages(rows, positions, quality, lossless_full) if self._asking else None
        return Committed(torch.tensor(before), torch.tensor(list(ends)), asked)

    def enter(self, indices: Sequence[int], requests: Sequence[RunningRequest]) -> None:
        """Requests have got these indices, or keep them for their next chunk."""
        for index, request in zip(indices, requests, strict=True):
            known = self.by_index.get(index)
            if known is not None and known.request is request.request:
                request.tokens = known.tokens
            self.by_index[index] = request
            if request.quality is not Quality.BALANCED:
                self._asking[index] = request

    def leave(self, indices: Sequence[int]) -> None:
        """These indices are free again."""
        for index in indices:
            self.by_index.pop(index, None)
            self._asking.pop(index, None)
