# SPDX-License-Identifier: Apache-2.0
"""Sealed pages go to host memory when nobody reads them, and come back when somebody will.

A page keeps its id, and so its place in SGLang's radix tree; its payload moves as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from sglang_diffxkv.kernels.arena import copy_frames
from sglang_diffxkv.pool.demotion import WINDOWS, coldest_first, unheld
from sglang_diffxkv.pool.host_level import HostLevel
from sglang_diffxkv.pool.page_states import PageStates, read_states
from sglang_diffxkv.pool.store import PageStore
from sglang_diffxkv.pool.unsettled import PageStateError

MOVED_AT_ONCE = 256
"""Pages: their tables take some MiB."""


def offload_cold(store: PageStore, held_since: int, headroom: int) -> int:
    """Offload cold pages, as far as the host has room for one more at its worst, until frames allow
    ``headroom`` pages to be opened.

    Args:
        held_since: the step since which every page that a request holds has been used.

    Returns:
        How many were.
    """
    ledger, before = store.ledger, store.counters.offloaded
    searched = _cold_pages(store, held_since)
    while (wanted := headroom * ledger.worst_frames - ledger.frames_free) > 0:
        pages = next(searched, None) if ledger.host_free >= ledger.worst_frames else None
        if pages is None:
            break
        frames = store.directory.num_frames[pages].cumsum(0).cpu()
        enough = int((frames < wanted).sum()) + 1  # the last of them may free more than that
        offload(store, pages[: min(enough, int((frames <= ledger.host_free).sum()))])
    return store.counters.offloaded - before


def _cold_pages(store: PageStore, held_since: int) -> Iterator[torch.Tensor]:
    """Sealed pages that nobody holds, of some windows at a time, coldest first; int64 [N].

    Goes round all of them if it is asked to, twice as many windows each time: where most pages are
    on the host, windows in a row may have none, and each time is waited for.
    """
    hand, at_once = store.recency.sealed_hand, WINDOWS
    left = hand.all_windows
    while left > 0:
        found = [unheld(store, part, held_since) for part in hand.stretch(min(at_once, left))]
        yield coldest_first(store, torch.cat(found))
        left, at_once = left - at_once, 2 * at_once


def offload(store: PageStore, pages: torch.Tensor) -> None:
    """Move the payload of sealed ``pages`` (int64 [N], distinct, held by nobody) to the host.

    Raises:
        PageStateError: one of them is not sealed.
        RuntimeError: the host has no room for them.
    """
    for part in pages.split(MOVED_AT_ONCE) if len(pages) else ():
        _offload(store, part)


def _offload(store: PageStore, pages: torch.Tensor) -> None:
    d, host = store.directory, host_of(store)
    states = PageStates(read_states(d, pages))
    if not states.sealed.all():
        raise PageStateError("offload: page is not sealed")
    store.ledger.offload(states.sealed_share(demoted=False), states.sealed_share(demoted=True))
    host.loading.wait_all()  # its frames are free before they have been read
    frames, heads, counts = d.frames[:, pages], d.heads[:, pages], d.frame_counts(pages)
    taken = host.arena.take(counts.flatten(), store.layout.max_frames).view_as(frames)
    copy_frames(store.arena.buffer, frames, host.arena.buffer, taken)
    store.arena.give_back(frames)
    store.totals.add_payload(heads, counts, sign=-1)
    host.heads[:, pages] = heads
    d.offload(pages, taken)
    store.counters.offloaded += len(pages)
    for listener in host.on_offload:
        listener(pages)


def load_back(store: PageStore, pages: torch.Tensor) -> None:
    """Bring the payload of ``pages`` (int64 [N], distinct, on the host) back.

    Who reads it waits for `HostLevel.loading`.

    Raises:
        PageStateError: one of them is not on the host.
        RuntimeError: there are not enough frames free.
    """
    if not len(pages):
        return
    d, host = store.directory, host_of(store)
    states = PageStates(read_states(d, pages))
    if not states.on_host.all():
        raise PageStateError("load back: page is not on the host")
    store.ledger.load_back(states.host_share(demoted=False), states.host_share(demoted=True))
    parts = [_return(store, part) for part in pages.split(MOVED_AT_ONCE)]
    with host.loading.layers(*chain.from_iterable(parts)) as layers:
        for layer in layers:  # of all pages, or the first layer would be there with the last
            for frames, taken in parts:
                copy_frames(host.arena.buffer, frames[layer], store.arena.buffer, taken[layer])
            host.loading.copied(layer)
    for frames, _ in parts:
        host.arena.give_back(frames)
    store.counters.loaded_back += len(pages)
    for listener in host.on_load_back:
        listener(pages)


def _return(store: PageStore, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Point ``pages`` (int64 [N]) on the host at frames of the device; the payload is yet to come.

    Returns:
        Their frames on the host, and those taken: int32 [L, N, max_frames].
    """
    d, host = store.directory, host_of(store)
    frames, heads, counts = d.frames[:, pages], host.heads[:, pages], d.frame_counts(pages)
    taken = store.arena.take(counts.flatten(), store.layout.max_frames).view_as(frames)
    store.totals.add_payload(heads, counts)
    d.load_back(pages, taken, heads)
    return frames, taken


def replace(store: PageStore, pages: torch.Tensor, computed: torch.Tensor) -> None:
    """``pages`` on the host get what was ``computed`` again of the same tokens, open or sealed,
    without a copy (int64 [N] both, all distinct); ``computed`` get, to be freed with it, what was
    on the host."""
    if not len(pages):
        return
    d, host = store.directory, host_of(store)
    d.exchange(pages, computed)
    host.heads[:, computed] = host.heads[:, pages]
    store.raw.move(d.raw_slot[pages], pages)
    for listener in host.on_load_back:
        listener(pages)


def on_host(store: PageStore, pages: torch.Tensor) -> torch.Tensor:
    """Those of ``pages`` (int64 [N]) that are on the host; waits for the device."""
    if not store.ledger.host_pages:
        return pages[:0]
    return pages[store.directory.on_host[pages]]


def host_of(store: PageStore) -> HostLevel:
    assert store.host is not None
    return store.host
