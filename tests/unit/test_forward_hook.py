# SPDX-License-Identifier: Apache-2.0
"""What the hook before a forward pass tells the backend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_diffxkv.attention.host_backend import HostBackend
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.patches.forward import _before_forward, _note_requests
from sglang_diffxkv.pool.running import RunningRequests
from tests.support.batches import Batch


def backend_of(batch: Batch) -> HostBackend:
    return HostBackend(batch.store, batch.req_to_token, DiffXKVConfig(), RunningRequests())


def test_mixed_batches_are_told_apart() -> None:
    """SGLang turns them into prefills before the backend sees them."""
    backend = backend_of(Batch([64], sealed=[0]))
    runner = SimpleNamespace(attn_backend=backend)
    for mode in (ForwardMode.MIXED, ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DECODE):
        _before_forward(runner, SimpleNamespace(forward_mode=mode))
        assert backend.is_mixed == (mode == ForwardMode.MIXED)


@pytest.mark.parametrize("mode", [ForwardMode.MIXED, ForwardMode.EXTEND])
def test_windows_age_in_mixed_batches(mode: ForwardMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is a decode step of every running request, too, though SGLang shows it as a prefill."""
    batch = Batch([130, 64], sealed=[0, 0])
    backend = backend_of(batch)
    forward_batch = SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=batch.rows,
        seq_lens=batch.lens,
        seq_lens_cpu=batch.lens,
        positions=batch.lens - 1,
        extend_prefix_lens=batch.lens - 1,
        extend_prefix_lens_cpu=(batch.lens - 1).tolist(),
        extend_seq_lens_cpu=[1, 1],
        out_cache_loc=batch.req_to_token[batch.rows, batch.lens - 1].long(),
    )
    before = batch.store.recency.decode_step
    monkeypatch.setattr("sglang_diffxkv.patches.forward.is_active", lambda: True)
    requests = [SimpleNamespace(kv=SimpleNamespace(req_pool_idx=row)) for row in (2, 3)]
    _note_requests(forward_batch, None, SimpleNamespace(reqs=requests))
    _before_forward(SimpleNamespace(attn_backend=backend), forward_batch)
    forward_batch.forward_mode = ForwardMode.EXTEND
    backend.init_forward_metadata(forward_batch)
    assert backend.batch_indices == [2, 3]
    assert batch.store.recency.decode_step - before == (mode == ForwardMode.MIXED)
