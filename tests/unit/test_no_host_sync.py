# SPDX-License-Identifier: Apache-2.0
"""The decode path of a GPU never waits for it: run on meta tensors, which have no values to give.

Whatever would bring a value to the host (`.item()`, `.cpu()`, `.tolist()`, `bool()`), or needs one
to know a shape, raises there. Kernel launches are recorded.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_diffxkv.attention.device_backend import DeviceBackend
from sglang_diffxkv.kernels.gpu.launch import recorded
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.ledger import Share
from sglang_diffxkv.pool.offload import on_host
from sglang_diffxkv.pool.running import RunningRequest, RunningRequests
from tests.support.policies import Shape, config_of
from tests.support.stores import make_store

SHAPE = Shape(layers=3, heads=2, dtype=torch.bfloat16)
LAYERS, HEADS, DIM, _ = SHAPE
BATCH = 5


def meta_backend(policy: str, host_bytes: int = 0) -> DeviceBackend:
    store = make_store(policy, 16 << 20, 2.0, shape=SHAPE, device="meta", host_bytes=host_bytes)
    table = torch.empty(8, 1024, dtype=torch.int32, device="meta")
    return DeviceBackend(store, table, config_of(policy), RunningRequests())


def meta_batch(lengths: list[int], queries: int = 1) -> SimpleNamespace:
    """Of a decode step, or of a verification of ``queries`` drafts."""

    def longs() -> torch.Tensor:
        return torch.empty(len(lengths), dtype=torch.int64, device="meta")

    return SimpleNamespace(
        batch_size=len(lengths),
        forward_mode=ForwardMode.DECODE if queries == 1 else ForwardMode.TARGET_VERIFY,
        spec_info=SimpleNamespace(draft_token_num=queries),
        req_pool_indices=longs(),
        seq_lens=longs(),
        seq_lens_cpu=torch.tensor(lengths),
        out_cache_loc=longs(),
    )


def decode(backend: DeviceBackend, batch: SimpleNamespace) -> None:
    """One step, all layers, with what the allocator does for it."""
    backend.store.open(torch.empty(2, dtype=torch.int64, device="meta"))
    backend.init_forward_metadata(batch)
    tokens = BATCH * batch.spec_info.draft_token_num
    hidden = torch.empty(tokens, HEADS * 4 * DIM, dtype=torch.bfloat16, device="meta")
    new = torch.empty(tokens, HEADS * DIM, dtype=torch.bfloat16, device="meta")
    decodes = batch.forward_mode.is_decode()
    attend = backend.forward_decode if decodes else backend.forward_extend
    for i in range(LAYERS):
        layer = RadixAttention(4 * HEADS, DIM, 0.1, HEADS, layer_id=i)
        out = attend(hidden, new, new, layer, batch)
        assert out.shape == hidden.shape
    backend.end_of_step()


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
@pytest.mark.parametrize("queries", [1, 2, 16])
@pytest.mark.parametrize("policy", ["diffxkv", "diffkv", "uniform", "lossless", "streaming"])
def test_decode_steps_do_not_wait_for_the_device(
    policy: str, queries: int, host_bytes: int
) -> None:
    backend = meta_backend(policy, host_bytes)
    backend.store.ledger.take_in_host(Share(bool(host_bytes), 1))
    with recorded() as launches:
        decode(backend, meta_batch([70, 130, 3, 999, 500], queries))
        first = [(launch.kernel, launch.grid) for launch in launches]
        launches.clear()
        decode(backend, meta_batch([71, 131, 4, 1000, 501], queries))
    assert first == [(launch.kernel, launch.grid) for launch in launches]
    per_layer = 4 if backend.store.policy.needs_scores else 3
    # Open two pages in two, look up, plan in three; then write, attend, merge, score.
    assert len(first) == 2 + 4 + per_layer * LAYERS


def test_requests_that_ask_for_a_quality_do_not_wait_either() -> None:
    backend = meta_backend("diffxkv")
    backend.batch_indices = list(range(BATCH))
    asking = RunningRequest(Quality.HIGH, step=0, request=None)
    backend.running.enter([2], [asking])
    with recorded():
        decode(backend, meta_batch([70, 130, 65, 999, 500]))  # the third opens a page
    assert backend.store.totals.by_quality[Quality.HIGH] == 1


def test_a_host_level_that_is_empty_is_not_asked() -> None:
    store = meta_backend("uniform", host_bytes=1 << 20).store
    pages = torch.empty(9, dtype=torch.int64, device="meta")
    assert len(on_host(store, pages)) == 0
    store.ledger.take_in_host(Share(1, 1))
    with pytest.raises(NotImplementedError, match="nonzero"):
        on_host(store, pages)


def test_a_step_that_seals_does_wait() -> None:
    """The test would notice: sealing lists pages, which needs their number."""
    backend = meta_backend("uniform")
    backend.full_pages.expect_any()
    with recorded(), pytest.raises(NotImplementedError, match="nonzero") as waited:
        decode(backend, meta_batch([70, 130, 3, 999, 500]))
    assert "gather_pages" in {entry.name for entry in waited.traceback}


def test_capture_touches_no_page() -> None:
    backend = meta_backend("diffxkv")
    before = backend.store.recency.step
    with recorded():
        backend.init_forward_metadata_out_graph(meta_batch([1] * BATCH), in_capture=True)
    assert backend.store.recency.step == before and backend.decode_batch is None
