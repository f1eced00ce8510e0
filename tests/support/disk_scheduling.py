# SPDX-License-Identifier: Apache-2.0
"""A scheduler's waiting queue on a pool with a disk behind it, without a model or a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler import Scheduler

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.events import LevelEvents, NoEvents
from sglang_diffxkv.offload.level import DiskLevel
from sglang_diffxkv.patches.page_keys import give_keys
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.payload import PagePayload, read_payload
from sglang_diffxkv.pool.sealing import seal
from tests.support.scheduling import Requests, Scheduling
from tests.support.stores import make_allocator


class DiskScheduling(Scheduling):
    """Every page holds what its tokens say, and is sealed when its request has finished.

    Needs our hooks (`tests.support.published`).
    """

    def __init__(
        self,
        folder: Path,
        policy: str = "diffkv",
        mib: float = 6,
        host_bytes: int = 4 << 20,
        disk_bytes: int = 1 << 28,
        events: LevelEvents | None = None,
    ) -> None:
        super().__init__(make_allocator(policy, mib, host_bytes=host_bytes), rows=8)
        self.store = self.allocator.store
        self.level = DiskLevel(self.store, events or NoEvents(), folder, disk_bytes, policy)
        self.requests = Requests()
        self.tree.diffxkv_disk = self.level
        give_keys(self.tree, dynamo=False)
        self.scheduler: Any = SimpleNamespace(tree_cache=self.tree, enable_lmcache=True)

    def come(self, tokens: Sequence[int], quality: Quality = Quality.BALANCED) -> Req:
        """A request arrives, and looks for its pages on disk."""
        request = self.requests(tokens, 4, quality)
        Scheduler._prefetch_kvcache(self.scheduler, request)
        return request

    def gate(self, request: Req) -> bool:
        """Whether it may be admitted; what has arrived for it is in the tree then."""
        self.tree.check_hicache_events()
        return self.tree.check_prefetch_progress(request.cache_request_handle)

    def serve(self, tokens: Sequence[int], quality: Quality = Quality.BALANCED) -> int:
        """A request comes, waits, is computed, and leaves its pages sealed in the tree.

        Returns:
            Tokens of it that were in the tree when it was admitted.
        """
        request = self.come(tokens, quality)
        while not self.gate(request):
            self.level.prefetcher.wait(1)
        request.init_next_round_input(self.tree)
        found = request.prefix_len
        self.waiting.append(request)
        assert self.prefill() == [request]
        pages = self._in_order(request)
        self.finish(request)
        if quality is not Quality.LOSSLESS:
            seal(self.store, pages[self.store.directory.raw_slot[pages] >= 0])
        return found

    def write_all(self) -> None:
        """Idle until everything is on disk."""
        self.level.backup.rest()
        while self.level.backup.is_behind:
            self.level.wait_for_writes(1)
            self.level.backup.rest()
        self.level.wait_for_writes(10)

    def payload(self, tokens: Sequence[int]) -> list[PagePayload]:
        """Of the full pages of a prompt that is in the tree."""
        request = self.requests(tokens, 4, Quality.BALANCED)
        request.init_next_round_input(self.tree)
        slots = self.tree.prefix_device_indices(request)
        return read_payload(self.store, slots[::PAGE_TOKENS].long() // PAGE_TOKENS)

    def _in_order(self, request: Req) -> torch.Tensor:
        end = request.extend_end // PAGE_TOKENS * PAGE_TOKENS
        row = self.rows.req_to_token[request.kv.req_pool_idx, :end]
        return row[::PAGE_TOKENS].long() // PAGE_TOKENS

    def _write(self, requests: list[Req], spans: list[tuple[int, int]]) -> None:
        super()._write(requests, spans)
        raw, d = self.store.raw, self.store.directory
        for request, (start, end) in zip(requests, spans, strict=True):
            row = self.rows.req_to_token[request.kv.req_pool_idx, start:end].long()
            tokens = torch.tensor(request.full_untruncated_fill_ids[start:end])
            slot, inside = d.raw_slot[row // PAGE_TOKENS].long(), row % PAGE_TOKENS
            for layer, (keys, values) in enumerate(zip(raw.keys, raw.values, strict=True)):
                phase = tokens[:, None, None] * torch.arange(1, keys[0, 0].numel() + 1).view(
                    keys.shape[2:]
                )
                keys[slot, inside] = torch.sin(phase + layer).to(keys.dtype)
                values[slot, inside] = torch.cos(phase * (layer + 2)).to(values.dtype)
            raw.counts[slot, inside] = 8
            raw.scores[:, slot, :, inside] = (tokens[:, None, None] % 7 / 7).float()
