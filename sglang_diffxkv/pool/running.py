# SPDX-License-Identifier: Apache-2.0
"""What is known of running requests, by their ``req_pool_index`` in SGLang's ReqToTokenPool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.shared_pages import PagedSequence, paged
from sglang_diffxkv.pool.store import AskedPages


@dataclass
class RunningRequest:
    """A request that has a ``req_pool_index``.

    Attributes:
        step: the one that its prompt, or the last chunk of it, ran in: all pages that it holds have
            been used in that or later.
        request: SGLang's.
        tokens: that it has; kept of lossless ones only.
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
        return [paged(x.request, x.tokens) for x in self._asking.values() if x.tokens]

    def entered_since(self, step: int) -> int:
        """The first step that somebody who runs entered in; else ``step``, the next one."""
        return min((request.step for request in self.by_index.values()), default=step)

    def stay(self, index: int, step: int) -> None:
        """A prompt waits for its next chunk; its pages are as used in ``step``."""
        self.by_index[index].step = step

    def opened(
        self, indices: Sequence[int], starts: Sequence[int], ends: Sequence[int]
    ) -> AskedPages | None:
        """The pages opened for a step whose requests asked for something; None where none did.

        Args:
            indices: ``req_pool_index`` of its B requests. starts, ends: their tokens before it and
                after it.
        """
        if not self._asking:
            return None
        tokens: list[int] = []
        quality: list[Quality] = []
        lossless_full = before = 0
        for index, start, end in zip(indices, starts, ends, strict=True):
            request = self._asking.get(index)
            if request is not None:
                opening = range(-(-start // PAGE_TOKENS) * PAGE_TOKENS, end, PAGE_TOKENS)
                tokens += [before + position - start for position in opening]
                quality += [request.quality] * len(opening)
                if request.quality is Quality.LOSSLESS:
                    lossless_full += end // PAGE_TOKENS - start // PAGE_TOKENS
                    request.tokens = end
            before += end - start
        return AskedPages(torch.tensor(tokens, dtype=torch.int64), quality, lossless_full)

    def enter(self, indices: Sequence[int], requests: Sequence[RunningRequest]) -> None:
        """Requests have got these indices, or keep them for their next chunk."""
        for index, request in zip(indices, requests, strict=True):
            known = self._asking.get(index)
            self.by_index[index] = request
            if request.quality is not Quality.BALANCED:
                self._asking[index] = request
                request.tokens = known.tokens if known is not None else 0

    def leave(self, indices: Sequence[int]) -> None:
        """These indices are free again."""
        for index in indices:
            self.by_index.pop(index, None)
            self._asking.pop(index, None)
