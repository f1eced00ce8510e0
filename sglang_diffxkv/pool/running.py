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
    """

    quality: Quality
    step: int
    request: Any


class RunningRequests:
    """Told when SGLang gives ``req_pool_index``es out and takes them back.

    Attributes:
        by_index: requests by ``req_pool_index``.
    """

    def __init__(self) -> None:
        self.by_index: dict[int, RunningRequest] = {}
        self._asking: dict[int, RunningRequest] = {}
        self._tokens = torch.zeros(0, dtype=torch.int64)

    def tokens(self, index: int) -> int:
        """Committed tokens of a request, as the ledger counts them; 0 before its first step."""
        return int(self._tokens[index]) if index in self.by_index else 0

    @property
    def lossless(self) -> list[PagedSequence]:
        """Running lossless requests that have pages, as long as they are."""
        return [
            paged(asking.request, tokens)
            for index, asking in self._asking.items()
            if asking.quality is Quality.LOSSLESS and (tokens := self.tokens(index))
        ]

    def entered_since(self, step: int) -> int:
        """The first step that somebody who runs entered in; else ``step``, the next one."""
        return min((request.step for request in self.by_index.values()), default=step)

    def stay(self, index: int, step: int) -> None:
        """A prompt waits for its next chunk; its pages are as used in ``step``."""
        self.by_index[index].step = step

    def commit(self, indices: Sequence[int], starts: torch.Tensor, ends: torch.Tensor) -> Committed:
        """Note how many tokens requests have for good, of B requests.

        Args:
            indices: their ``req_pool_index``.
            starts: int64 [B] on the host, tokens before their first step, those of a prefix that
                others have computed.
            ends: int64 [B] on the host, committed tokens.
        """
        self._make_room(indices)
        rows = torch.tensor(indices, dtype=torch.int64)
        known = self._tokens[rows]
        starts = torch.where(known > 0, known, starts)
        self._tokens[rows] = ends
        asked = self._asked(indices, starts, ends) if self._asking else None
        return Committed(starts, ends, asked)

    def _asked(
        self, indices: Sequence[int], starts: torch.Tensor, ends: torch.Tensor
    ) -> AskedPages:
        rows: list[int] = []
        positions: list[int] = []
        quality: list[Quality] = []
        lossless_full = 0
        for index, start, end in zip(indices, starts.tolist(), ends.tolist(), strict=True):
            request = self._asking.get(index)
            if request is None:
                continue
            opening = range(-(-start // PAGE_TOKENS) * PAGE_TOKENS, end, PAGE_TOKENS)
            rows += [index] * len(opening)
            positions += opening
            quality += [request.quality] * len(opening)
            if request.quality is Quality.LOSSLESS:
                lossless_full += end // PAGE_TOKENS - start // PAGE_TOKENS
        return AskedPages(rows, positions, quality, lossless_full)

    def enter(self, indices: Sequence[int], requests: Sequence[RunningRequest]) -> None:
        """Requests have got these indices, or keep them for their next chunk."""
        self._make_room(indices)
        for index, request in zip(indices, requests, strict=True):
            known = self.by_index.get(index)
            if known is None or known.request is not request.request:
                self._tokens[index] = 0
            self.by_index[index] = request
            if request.quality is not Quality.BALANCED:
                self._asking[index] = request

    def _make_room(self, indices: Sequence[int]) -> None:
        lacking = max(indices, default=-1) + 1 - len(self._tokens)
        if lacking > 0:
            self._tokens = torch.nn.functional.pad(self._tokens, (0, lacking))

    def leave(self, indices: Sequence[int]) -> None:
        """These indices are free again."""
        for index in indices:
            self.by_index.pop(index, None)
            self._asking.pop(index, None)
