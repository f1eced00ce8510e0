# SPDX-License-Identifier: Apache-2.0
"""How payload goes to the host and back on a GPU: who waits for what, and the host for nothing.

Copies from the host run as late as they may (`fake_streams`).
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.loading import Loading
from sglang_diffxkv.pool.offload import load_back, offload, on_host
from sglang_diffxkv.pool.payload import PagePayload, adopt, read_payload
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStore
from tests.support.device_server import LAYERS, Server
from tests.support.fake_device import DEVICE, waits
from tests.support.fake_streams import Event, Stream
from tests.support.pages import running

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real device has its own tools"),
    pytest.mark.usefixtures("noticing_device"),
]

HOST_BYTES = 400_000
PAGES = 3


def started(policy: str = "uniform") -> Server:
    """Two requests that decode, and a store with a host level."""
    server = Server(policy, host_bytes=HOST_BYTES)
    requests = [running(Quality.BALANCED, 0), running(Quality.BALANCED, 0)]
    server.allocator.running.enter([2, 1], requests)
    server.extend([100, 62])
    server.backend.full_pages._waiting = 0
    return server


def cached(server: Server, pages: int = PAGES) -> torch.Tensor:
    """Sealed pages of random tokens that nobody runs with: int64 [N]."""
    store = server.store
    slots = server.allocator.alloc(pages * PAGE_TOKENS)
    assert slots is not None
    ids = slots[::PAGE_TOKENS] // PAGE_TOKENS
    raw = store.raw
    for slot in store.directory.raw_slot[ids].host.tolist():
        for layer in range(LAYERS):
            for tensor in (raw.keys[layer], raw.values[layer]):
                tensor.host[slot] = torch.randn_like(tensor.host[slot])
        raw.scores[0].host[slot] = torch.rand_like(raw.scores[0].host[slot])
        raw.counts.host[slot] = 8
    store.ledger.commit(len(slots), full=pages)
    store.directory.filled.index_fill_(0, ids, PAGE_TOKENS)
    seal(store, ids)
    store.settle()
    return ids


def stream_of(store: PageStore) -> Stream:
    assert store.host is not None
    stream = store.host.loading._stream
    assert isinstance(stream, Stream)
    return stream


def payload_of(store: PageStore, layer: int, pages: torch.Tensor) -> torch.Tensor:
    """Bytes of one layer as they lie on the device, without a wait for any."""
    frames = store.directory.frames.host[layer][pages.host]
    return store.arena.buffer.host[frames[frames >= 0].long()].clone()


def assert_same(before: list[PagePayload], after: list[PagePayload]) -> None:
    for was, now in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))


def wipe(store: PageStore) -> None:
    """Others have written to every frame of the device that is free."""
    free = store.arena.free_ids().host
    store.arena.buffer.host[free] = 0xAB


@pytest.mark.parametrize("policy", ["diffxkv", "diffkv", "uniform"])
def test_what_comes_back_is_what_went(policy: str) -> None:
    server = started(policy)
    store, pages = server.store, cached(server)
    before = read_payload(store, pages)
    assert max(int(x.counts.sum()) for x in before) > LAYERS
    for _ in range(2):
        offload(store, pages)
        assert_same(before, read_payload(store, pages))
        wipe(store)
        load_back(store, pages)
        assert stream_of(store).pending == LAYERS
        assert_same(before, read_payload(store, pages))
        assert stream_of(store).pending == 0
    assert server.allocator.check() == []


@pytest.mark.parametrize("at_once", [1, 256])
def test_each_layer_waits_for_its_own_copies(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all pages, however many are moved at a time, and not for those of later layers."""
    monkeypatch.setattr("sglang_diffxkv.pool.offload.MOVED_AT_ONCE", at_once)
    server = started()
    store, pages = server.store, cached(server)
    before = [payload_of(store, layer, pages) for layer in range(LAYERS)]
    offload(store, pages)
    wipe(store)
    load_back(store, pages)
    parts = stream_of(store).pending // LAYERS
    assert parts == -(-PAGES // at_once)
    for layer in range(LAYERS):
        assert not torch.equal(payload_of(store, layer, pages), before[layer])
        store.layer_pages(layer)
        assert torch.equal(payload_of(store, layer, pages), before[layer])
        assert stream_of(store).pending == parts * (LAYERS - 1 - layer)


def begins_with(server: Server, pages: torch.Tensor) -> None:
    """The first request is one whose prompt begins with them."""
    slots = pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=DEVICE)
    server.table[2, : slots.numel()] = slots.flatten().int()
    server.lens = [slots.numel(), server.lens[1]]


def admitted(server: Server, pages: torch.Tensor | None) -> bool:
    """Whether a prompt of 40 new tokens behind cached ``pages`` is."""
    budget = server.allocator.create_prefill_budget(server.cache)
    if pages is not None:
        budget.expect_prefix(pages)
    found, _ = budget.check_prefill(
        extend_input_len=40, total_tokens=60, max_new_tokens=20, input_tokens=40,
        swa_host_hit_length=0, chunk_limit=2048,
    )  # fmt: skip
    return found


def test_a_prefill_begins_before_its_prefix_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    server = started()
    store, pages = server.store, cached(server)
    offload(store, pages)
    wipe(store)
    assert admitted(server, pages)
    stream, order = stream_of(store), []
    layer_pages = store.layer_pages

    def noting(layer: int) -> Any:
        before = stream.pending
        found = layer_pages(layer)
        order.append((layer, before, stream.pending))
        return found

    monkeypatch.setattr(store, "layer_pages", noting)
    begins_with(server, pages)
    server.extend([40, 8])
    assert order == [(i, LAYERS - i, LAYERS - 1 - i) for i in range(LAYERS)]


def test_a_decode_step_waits_before_its_graph() -> None:
    """A graph cannot; nor does the host."""
    server = started()
    store, pages = server.store, cached(server)
    offload(store, pages)
    load_back(store, pages)
    lens = torch.tensor(server.lens)
    batch: Any = type("Batch", (), {
        "forward_mode": ForwardMode.DECODE, "batch_size": 2, "req_pool_indices": server.rows,
        "seq_lens": lens.to(DEVICE), "seq_lens_cpu": lens,
    })()  # fmt: skip
    server.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    assert stream_of(store).pending == LAYERS
    with waits() as found:
        server.backend.batch_indices = None
        server.backend.init_forward_metadata_out_graph(batch)
        assert found == []
    assert stream_of(store).pending == 0


def test_admission_waits_for_the_device_where_something_is_on_the_host() -> None:
    """Once to know what of a prefix is there; to bring it back twice more, for its frames and its
    states. Copies are not waited for."""
    server = started()
    store = server.store
    here, gone = cached(server, 2), cached(server)
    for prefix, expected in ((None, 0), (here, 0)):
        with waits() as found:
            assert admitted(server, prefix) and len(found) == expected, f"{found}"
    offload(store, gone)
    server.decode(checks=False)
    for prefix, expected in ((None, 0), (here, 1), (gone, 3), (gone, 0)):
        with waits() as found:
            Event.launched += 1  # a forward pass runs
            assert admitted(server, prefix) and len(found) == expected, f"{found}"
    assert stream_of(store).pending == LAYERS and not len(on_host(store, gone))


def test_frames_that_are_loaded_into_are_not_given_out() -> None:
    server = started()
    store, pages = server.store, cached(server)
    offload(store, pages)
    load_back(store, pages)
    store.release(pages)
    assert stream_of(store).pending == 0


def test_frames_of_the_host_that_are_still_read_are_not_written() -> None:
    """Neither by pages that go there, nor by those that come from a disk."""
    server = started()
    store, pages, others = server.store, cached(server), cached(server)
    host = store.host
    assert host is not None
    before, saved = read_payload(store, pages), read_payload(store, others)
    for write in (
        lambda: offload(store, others),
        lambda: adopt(store, server.allocator.take_free(len(saved)), saved),
    ):
        offload(store, pages)
        load_back(store, pages)
        assert stream_of(store).pending == LAYERS
        write()  # to the frames that were given back last
        assert_same(before, read_payload(store, pages))
    assert server.allocator.check() == []


def test_what_copies_use_is_kept_for_them() -> None:
    """Torch's allocators are told of tables; memory of the host is kept until the step is over."""
    server = started()
    store, pages = server.store, cached(server)
    saved = read_payload(store, pages)
    offload(store, pages)
    load_back(store, pages)
    assert len(stream_of(store).used) == 2, "frames there and here"
    assert store.host is not None
    loading: Loading = store.host.loading
    Event.launched += 1
    adopt(store, server.allocator.take_free(len(saved)), saved)
    ((_, staging),) = loading._kept
    kept = weakref.ref(staging)
    del staging
    gc.collect()
    assert kept() is not None
    Event.seen = Event.launched
    loading.keep(torch.zeros(1))
    gc.collect()
    assert len(loading._kept) == 1


def test_a_page_on_the_host_that_a_decode_step_has_is_noticed() -> None:
    server = started()
    store, pages = server.store, cached(server)
    offload(store, pages[:1])
    begins_with(server, pages[:1])
    assert store.problems() == []
    with waits() as found:
        server.decode(checks=False)
        store.problems()  # which asks for it
        Event.seen = Event.launched
        assert any("neither open nor sealed" in problem for problem in store.problems())
        assert found == []
