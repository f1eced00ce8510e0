# SPDX-License-Identifier: Apache-2.0
"""As much of SGLang as drives the backend on a device that notices what waits (`fake_device`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_diffxkv.attention.device_backend import GPUBackend
from sglang_diffxkv.attention.device_decode import DeviceDecode
from sglang_diffxkv.attention.full_pages import FullPages
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.request_rows import RequestRows
from sglang_diffxkv.pool.sizing import DEMOTION_SLACK
from tests.support.fake_device import DEVICE, Event
from tests.support.policies import Shape
from tests.support.stores import PrefixCache, make_store

SHAPE = Shape(layers=2, heads=1, dtype=torch.bfloat16)
LAYERS, HEADS, DIM, _ = SHAPE
WINDOW = 64


class Server:
    """As much of SGLang as drives the backend: rows of requests, an allocator, forward passes."""

    def __init__(self, policy: str) -> None:
        self.store = store = make_store(
            policy, 2 << 20, DEMOTION_SLACK, shape=SHAPE, raw_share=0.5, device=DEVICE,
            window=WINDOW,
        )  # fmt: skip
        pool: Any = SimpleNamespace(store=store, write=self._write, start_layer=0)
        self.allocator = DiffXKVAllocator(
            store.plan.virtual_tokens, PAGE_TOKENS, torch.bfloat16, DEVICE, pool, need_sort=False
        )
        self.cache = PrefixCache(self.allocator)
        self.table = torch.zeros(4, 512, dtype=torch.int32, device=DEVICE)
        self.backend = backend = object.__new__(GPUBackend)
        backend.store, backend.config, backend.token_to_kv_pool = store, store.policy.config, pool
        backend.req_to_token_pool = SimpleNamespace(req_to_token=self.table)
        backend.rows = self.allocator.rows = RequestRows(4, self.table.device)
        backend.decode = DeviceDecode(store, self.table, WINDOW)
        backend.full_pages = FullPages(WINDOW, store.policy.needs_scores)
        backend.decode_step = backend.decode_batch = backend.forward_metadata = None
        self.lens = [0, 0]
        self._checks = True
        self.rows = torch.tensor([2, 1], device=DEVICE)

    def _write(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.store.raw.keys[layer].flatten(0, 1)[rows] = k
        self.store.raw.values[layer].flatten(0, 1)[rows] = v

    def extend(self, new: list[int]) -> None:
        """A chunk of each prompt."""
        before = torch.tensor(self.lens)
        after = before + torch.tensor(new)
        last = self._last(before)
        loc = self.allocator.alloc_extend(
            before.to(DEVICE), before, after.to(DEVICE), after, last, sum(new)
        )
        self._run(after, loc, SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: False, is_mixed=lambda: False),
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
            forward_mode=SimpleNamespace(is_decode=lambda: True),
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
            forward_mode=SimpleNamespace(is_decode=lambda: True)
        ))  # fmt: skip

    def _last(self, lens: torch.Tensor) -> torch.Tensor:
        places = (lens - 1).clamp(min=0).to(DEVICE)
        return torch.where(lens.to(DEVICE) > 0, self.table[self.rows, places].long(), -1)

    def _run(self, lens: torch.Tensor, loc: torch.Tensor, batch: Any) -> None:
        """A forward pass over new tokens, at the virtual slots ``loc``."""
        begin = 0
        for i, (row, old, length) in enumerate(
            zip(self.rows.host.tolist(), self.lens, lens.tolist(), strict=True)
        ):
            self.table[row, old:length] = loc[begin : begin + length - old].int()
            begin, self.lens[i] = begin + length - old, length
        vars(batch).update(
            batch_size=2,
            req_pool_indices=self.rows,
            seq_lens=lens.to(DEVICE),
            seq_lens_cpu=lens,
            out_cache_loc=loc,
        )
        self.backend.batch_rows = [2, 1]
        Event.launched += 1
        self.backend.init_forward_metadata(batch)
        self._forward(len(loc), batch)
        self.backend.end_of_step()
        Event.seen = Event.launched - 1  # the results of the one before are processed now
        assert self.backend.forward_metadata is None and self.backend.decode_batch is None

    def _forward(self, tokens: int, batch: Any) -> None:
        decodes = batch.forward_mode.is_decode()
        attend = self.backend.forward_decode if decodes else self.backend.forward_extend
        for layer_id in range(LAYERS):
            layer = SimpleNamespace(
                layer_id=layer_id, tp_k_head_num=HEADS, tp_q_head_num=2 * HEADS,
                qk_head_dim=DIM, scaling=0.1,
            )  # fmt: skip
            qkv = torch.randn(tokens, 4 * HEADS * DIM, device=DEVICE).bfloat16()
            q, k, v = qkv.split([2 * HEADS * DIM, HEADS * DIM, HEADS * DIM], dim=1)
            out = attend(q, k, v, layer, batch)
            assert out.shape == q.shape
            assert not self._checks or bool(out.isfinite().all())
