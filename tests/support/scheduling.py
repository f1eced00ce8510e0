# SPDX-License-Identifier: Apache-2.0
"""SGLang's own admission on our pool, without a model: for tests of who is admitted when."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.allocation import alloc_for_extend
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches import quality as quality_hook
from sglang_diffxkv.patches import running as running_hook
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.allocator import find_allocator
from tests.support.pages import ask, write

VOCABULARY = 1000


def prompt(pages: float, seed: int = 0) -> list[int]:
    """Random tokens, so many pages of them."""
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(int(pages * PAGE_TOKENS))]


class Requests:
    """Makes `Req`s, each of a prompt in tokens."""

    def __init__(self) -> None:
        self._ids = itertools.count()

    def __call__(self, prompt: Sequence[int], new: int, quality: Quality, priority: int = 0) -> Req:
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        request = Req(str(next(self._ids)), "", array("q", prompt), params, vocab_size=VOCABULARY)
        request.priority = priority
        quality_hook.set_quality(request, quality)
        if quality is not Quality.BALANCED:
            request.extra_key = f"|diffxkv:{quality.name.lower()}"
        return request


class _Running(ScheduleBatch):
    """Without the tensors that a forward pass needs."""

    def filter_batch(self, *, keep_indices: list[int]) -> None:  # type: ignore[override]
        self.reqs = [self.reqs[i] for i in keep_indices]


class Scheduling:
    """The part of SGLang's scheduler between its waiting queue and a prefill batch.

    Its loop over the waiting queue is written after ``_get_new_batch_prefill_raw``; all that is
    called in it is SGLang's, hooks included where they are applied.

    Attributes:
        ours: the allocator, or the part of it that has our pages.
        components: what the tree keeps of a prefix; ``tree_options``: what it needs to know of it.
    """

    components: ClassVar[tuple[ComponentType, ...]] = (ComponentType.FULL,)
    tree_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        allocator: BaseTokenToKVPoolAllocator,
        rows: int | ReqToTokenPool,
        chunk: int = 2048,
        radix: bool = True,
    ) -> None:
        self.allocator, self.chunk = allocator, chunk
        ours = find_allocator(allocator)
        assert ours is not None
        self.ours = ours
        made = isinstance(rows, ReqToTokenPool)
        self.rows = rows if made else ReqToTokenPool(rows, 1 << 16, "cpu", False)
        running_hook.follow(self.rows, allocator)
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=not radix,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=allocator,
                page_size=PAGE_TOKENS,
                tree_components=self.components,
                enable_mamba_extra_buffer=ComponentType.MAMBA in self.components,
                **self.tree_options,
            )
        )
        self.running = self._batch(_Running, [])
        self.waiting: list[Req] = []
        self.chunked: Req | None = None
        self.preempted = 0

    def _batch(self, kind: type[ScheduleBatch], requests: list[Req]) -> ScheduleBatch:
        model = SimpleNamespace(vocab_size=VOCABULARY, is_encoder_decoder=False)
        return kind.init_new(
            requests,
            self.rows,
            self.allocator,
            self.tree,
            model,
            False,
            SpeculativeAlgorithm.NONE,
        )

    def prefill(self, preemption: bool = False, cached: bool = True) -> list[Req]:
        """One prefill step; who was in it. ``cached``: their prompts, and at once."""
        self.waiting.sort(key=lambda request: -request.priority)
        adder: Any = PrefillAdder(
            PAGE_TOKENS, self.tree, self.allocator, self.running, 0.5, 16384, self.chunk,
            priority_scheduling_preemption_threshold=10,
        )  # fmt: skip
        if self.chunked is not None:
            self.chunked.init_next_round_input()
            self.chunked = adder.add_chunked_req(self.chunked)
        for request in self.waiting:
            if adder.budget_state() == AddReqResult.OTHER:
                break
            free = self.rows.available_size() + sum(r.kv.holds_kv for r in adder.can_run_list)
            full = len(adder.can_run_list) >= free
            if full and not (preemption and adder.preempt_to_schedule(request)):
                break
            request.init_next_round_input(self.tree)
            if adder.add_one_req(request, self.chunked is not None, None) != AddReqResult.CONTINUE:
                break
        self.preempted += len(adder.preempt_list)
        self.waiting = [r for r in self.waiting if r not in adder.can_run_list]
        self.waiting += adder.preempt_list
        self.chunked = adder.new_chunked_req or self.chunked
        if adder.can_run_list:
            self._run(adder.can_run_list)
        if cached:
            self.cache(adder.can_run_list)
        return list(adder.can_run_list)

    def cache(self, requests: Sequence[Req]) -> None:
        """The results of a prefill have come: prompts go to the tree."""
        for request in requests:
            checkpoint_kv_cache(request, self.tree)

    def _run(self, requests: list[Req]) -> None:
        """Allocate for a prefill, note what a backend notes."""
        batch = self._batch(ScheduleBatch, requests)
        batch.forward_mode = ForwardMode.EXTEND
        batch.prefix_lens = [r.prefix_len for r in requests]
        batch.extend_lens = [r.extend_len for r in requests]
        batch.seq_lens_cpu = batch.seq_lens = torch.tensor([r.extend_end for r in requests])
        batch.extend_num_tokens = sum(batch.extend_lens)
        alloc_for_extend(batch)
        self._write(requests, [(r.prefix_len, r.extend_end) for r in requests])
        self.running.reqs += [r for r in requests if r is not self.chunked]

    def _write(self, requests: list[Req], spans: list[tuple[int, int]]) -> None:
        store = self.ours.store
        store.begin_step(decodes=False)
        for request, (start, end) in zip(requests, spans, strict=True):
            row = request.kv.req_pool_idx
            slots = self.rows.req_to_token[row, start:end].long()
            pages = torch.unique_consecutive(slots // PAGE_TOKENS)
            position = torch.arange(start // PAGE_TOKENS, -(-end // PAGE_TOKENS))
            write(store, pages, position, torch.full((len(pages),), end))
            self.ours.running.commit([row], torch.tensor([start]), torch.tensor([end]))
            level = quality_hook.quality_of(request)
            if level is not Quality.BALANCED:
                ask(store, pages, [level] * len(pages))

    def decode(self) -> None:
        """A step that reads every page of those who run, and adds nothing to them."""
        self.ours.store.begin_step(decodes=True)
        for request in self.running.reqs:
            self.ours.store.recency.read(torch.tensor(list(self.pages(request))))

    @property
    def held(self) -> list[Req]:
        """Requests that have pages: those that run, and a prompt between two chunks."""
        chunked = [] if self.chunked is None else [self.chunked]
        return [*self.running.reqs, *chunked]

    def pages(self, request: Req) -> set[int]:
        """Pages of one of them."""
        slots = self.rows.req_to_token[request.kv.req_pool_idx, : request.extend_end]
        return set((slots.long() // PAGE_TOKENS).tolist())

    def finish(self, request: Req) -> None:
        """Its prompt stays in the tree."""
        request.finished_reason = FINISH_LENGTH(length=0)
        release_kv_cache(request, self.tree, checkpoint=True)
        self.running.reqs.remove(request)

    def abort_chunked(self) -> None:
        """The prompt between two chunks is given up: nothing that it computed stays."""
        request, self.chunked = self.chunked, None
        assert request is not None
        request.finished_reason = FINISH_ABORT()
        release_kv_cache(request, self.tree, checkpoint=False)
