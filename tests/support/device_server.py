# SPDX-License-Identifier: Apache-2.0
"""As much of SGLang as drives the backend on a device that notices what waits (`fake_device`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_diffxkv.attention.device_backend import DeviceBackend
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.importance.features import Rotary
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.kv_pool import DiffXKVPool
from sglang_diffxkv.pool.sizing import DEMOTION_SLACK
from tests.support.fake_device import DEVICE
from tests.support.fake_streams import Event
from tests.support.importance import random_importance
from tests.support.policies import Shape, config_of
from tests.support.stores import PrefixCache, make_store

SHAPE = Shape(layers=2, heads=1, dtype=torch.bfloat16)
LAYERS, HEADS, DIM, _ = SHAPE
WINDOW = 64


class Server:
    """As much of SGLang as drives the backend: rows of requests, an allocator, forward passes."""

    def __init__(self, policy: str, *, predicts: bool = False, host_bytes: int = 0) -> None:
        self.store = store = make_store(
            policy, 2 << 20, DEMOTION_SLACK, shape=SHAPE, raw_share=0.5, device=DEVICE,
            window=WINDOW, host_bytes=host_bytes,
        )  # fmt: skip
        if predicts:
            model = random_importance(Rotary(DIM), SHAPE)
            store.policy.importance = model.to(torch.device(DEVICE))
        pool = object.__new__(DiffXKVPool)  # whose own constructor would make another store
        pool.store = store
        self.allocator = DiffXKVAllocator(
            store.sizes.virtual_tokens, PAGE_TOKENS, torch.bfloat16, DEVICE,
            kvcache=pool, need_sort=False,
        )  # fmt: skip
        self.cache = PrefixCache(self.allocator)
        self.table = torch.zeros(4, 512, dtype=torch.int32, device=DEVICE)
        config = config_of(policy, window=WINDOW)
        self.backend = DeviceBackend(store, self.table, config, self.allocator.running)
        self.lens, self.allocated = [0, 0], [0, 0]
        self._checks = True
        self.rows = torch.tensor([2, 1], device=DEVICE)

    def extend(self, new: list[int]) -> None:
        """A chunk of each prompt."""
        before = torch.tensor(self.lens)
        after = before + torch.tensor(new)
        last = self._last(before)
        loc = self.allocator.alloc_extend(
            before.to(DEVICE), before, after.to(DEVICE), after, last, sum(new)
        )
        self._run(after, loc, SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            positions=torch.cat(
                [torch.arange(a, b) for a, b in zip(before, after, strict=True)]
            ).to(DEVICE),
            extend_prefix_lens=before.to(DEVICE).int(),
            extend_prefix_lens_cpu=before.tolist(),
            extend_seq_lens_cpu=new,
        ))  # fmt: skip

    def warm_up(self) -> None:
        """SGLang's warm-up: a step over the page of padding that does not end."""
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=3,
            req_pool_indices=torch.zeros(3, dtype=torch.int64, device=DEVICE),
            seq_lens=torch.ones(3, dtype=torch.int64, device=DEVICE),
            seq_lens_cpu=torch.ones(3, dtype=torch.int64),
            out_cache_loc=torch.zeros(3, dtype=torch.int64, device=DEVICE),
        )
        self.backend.init_forward_metadata(batch)
        self._forward(3, batch)

    def decode(self, checks: bool = True) -> None:
        """One token for both; ``checks``: look at the output, which is to wait for it."""
        self._checks = checks
        before = torch.tensor(self.lens)
        assert self.allocator.check_decode_capacity(num_tokens=128, tree_cache=self.cache)
        loc = self.allocator.alloc_decode((before + 1).to(DEVICE), before + 1, self._last(before))
        self._run(before + 1, loc, SimpleNamespace(
            forward_mode=ForwardMode.DECODE
        ))  # fmt: skip

    def verify(self, drafts: int, accepted: list[int]) -> None:
        """Drafts for both, of which so many are accepted, the first one included."""
        self._checks = False
        committed = torch.tensor(self.lens)
        pages = -(-(committed + 2 * drafts) // PAGE_TOKENS)
        before = torch.tensor(self.allocated).maximum(committed)
        after = (pages * PAGE_TOKENS).maximum(before)
        new = int((after - before).sum())
        assert self.allocator.check_decode_capacity(num_tokens=new, tree_cache=self.cache)
        loc = self.allocator.alloc_extend(
            before.to(DEVICE), before, after.to(DEVICE), after, self._last(before), new
        )
        self._assign(before.tolist(), after.tolist(), loc)
        self.allocated = after.tolist()
        self._pass(committed, SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            spec_info=SimpleNamespace(draft_token_num=drafts),
        ), 2 * drafts)  # fmt: skip
        self.lens = (committed + torch.tensor(accepted)).tolist()

    def _last(self, lens: torch.Tensor) -> torch.Tensor:
        places = (lens - 1).clamp(min=0).to(DEVICE)
        return torch.where(lens.to(DEVICE) > 0, self.table[self.rows, places].long(), -1)

    def _run(self, lens: torch.Tensor, loc: torch.Tensor, batch: Any) -> None:
        """A forward pass over new tokens, at the virtual slots ``loc``."""
        self._assign(self.lens, lens.tolist(), loc)
        self.lens = lens.tolist()
        batch.out_cache_loc = loc
        self._pass(lens, batch, len(loc))

    def _assign(self, starts: list[int], ends: list[int], loc: torch.Tensor) -> None:
        """Enter new slots into SGLang's table."""
        begin = 0
        for row, start, end in zip(self.rows.host.tolist(), starts, ends, strict=True):
            self.table[row, start:end] = loc[begin : begin + end - start].int()
            begin += end - start

    def _pass(self, lens: torch.Tensor, batch: Any, tokens: int) -> None:
        vars(batch).update(
            batch_size=2,
            req_pool_indices=self.rows,
            seq_lens=lens.to(DEVICE),
            seq_lens_cpu=lens,
        )
        self.backend.batch_indices = [2, 1]
        Event.launched += 1
        self.backend.init_forward_metadata(batch)
        self._forward(tokens, batch)
        self.backend.end_of_step()
        Event.seen = Event.launched - 1  # the results of the one before are processed now
        assert self.backend.forward_metadata is None and self.backend.decode_batch is None

    def _forward(self, tokens: int, batch: Any) -> None:
        decodes = batch.forward_mode.is_decode()
        attend = self.backend.forward_decode if decodes else self.backend.forward_extend
        for layer_id in range(LAYERS):
            layer = RadixAttention(2 * HEADS, DIM, 0.1, HEADS, layer_id)
            qkv = torch.randn(tokens, 4 * HEADS * DIM, device=DEVICE).bfloat16()
            q, k, v = qkv.split([2 * HEADS * DIM, HEADS * DIM, HEADS * DIM], dim=1)
            out = attend(q, k, v, layer, batch)
            assert out.shape == q.shape
            assert not self._checks or bool(out.isfinite().all())
