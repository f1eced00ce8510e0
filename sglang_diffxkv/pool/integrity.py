# SPDX-License-Identifier: Apache-2.0
"""Invariants of directory + arena + raw pages + ledger, as code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.arena import FrameArena
from sglang_diffxkv.pool.ledger import OpenShare, Share
from sglang_diffxkv.pool.page_states import PageStates, read_states
from sglang_diffxkv.pool.ranks import alone
from sglang_diffxkv.pool.store import PageStore
from sglang_diffxkv.pool.totals import Totals

SLICE = 4096
"""Pages that are looked at at a time: some MiB, however large the directory."""


def check_integrity(store: PageStore) -> list[str]:
    """Recompute the state from the tables; returns violations, empty when healthy.

    Looks at every page and frame, and waits for the device.
    """
    store.settle()
    problems = [*store.problems(), *_check_frames(store), *_check_raw_pages(store)]
    return [*problems, *_check_sums(store)]


def _slices(store: PageStore) -> Iterator[torch.Tensor]:
    """All pages, a few at a time."""
    device = store.directory.raw_slot.device
    yield from torch.arange(1, store.directory.num_pages + 1, device=device).split(SLICE)


def _check_frames(store: PageStore) -> list[str]:
    d, ledger, host = store.directory, store.ledger, store.host
    found = set(_check_conservation(store, "frames", store.arena, d.sealed))
    if store.arena.num_free < ledger.frames_total - ledger.frames_used:
        found.add("ledger: the arena has fewer frames free than are counted as free")
    if host is not None:
        found |= set(_check_conservation(store, "frames on the host", host.arena, d.on_host))
        if host.arena.num_free < ledger.host_free:
            found.add("ledger: the host has fewer frames free than are counted as free")
    for pages in _slices(store):
        sealed, allocated = d.sealed[pages], d.num_frames[pages]
        has_frames = sealed | d.on_host[pages]
        unowned = allocated[has_frames] - d.owned(pages[has_frames])
        if bool((unowned < 0).any()):
            found.add("frames: a page has more than are allocated to it")
        if store.agree is alone and bool((unowned > 0).any()):
            found.add("frames: a page has fewer than are allocated to it")
        if bool((allocated[~has_frames] != 0).any()):
            found.add("frames: some are allocated to a page that is not sealed")
        if bool((allocated > store.ledger.worst_frames).any()):
            found.add("frames: more are allocated to a page than it reserved")
        if bool(d.heads[:, pages[~sealed]].any()):
            found.add("a page that is not sealed has a payload")
        if bool(d.key[pages[~d.in_use[pages]]].any()):
            found.add("a free page has a key")
    return sorted(found)


def _check_conservation(
    store: PageStore, name: str, arena: FrameArena, has_frames: torch.Tensor
) -> list[str]:
    """Each frame of an arena is free, or one page's, of those that ``has_frames`` (bool [V])."""
    owners = torch.zeros(arena.stack.numel(), dtype=torch.uint8)
    num_free, owned = int(arena.num_free), 0
    owners.index_add_(0, arena.free_ids().cpu(), torch.ones(num_free, dtype=torch.uint8))
    for pages in _slices(store):
        frames = store.directory.frames[:, pages[has_frames[pages]]]
        ids = frames[frames >= 0].long().cpu()
        owned += len(ids)
        owners.index_add_(0, ids, torch.ones(len(ids), dtype=torch.uint8))
    if bool((owners == 1).all()):
        return []
    return [f"{name}: {num_free} free + {owned} owned are not the {len(owners)}, each once"]


def _check_raw_pages(store: PageStore) -> list[str]:
    directory, raw = store.directory, store.raw
    problems = []
    is_open = directory.raw_slot >= 0
    pages = torch.nonzero(is_open).flatten()
    slots = directory.raw_slot[pages].long()
    if not torch.equal(raw.page[slots].long(), pages):
        problems.append("raw pages: directory and slots disagree about owners")
    free, total = raw.free_slots(), raw.page.numel()
    everything = torch.cat([free, slots])
    if everything.numel() != total or torch.unique(everything).numel() != total:
        problems.append(
            f"raw pages: {free.numel()} free + {slots.numel()} owned are not the {total} slots"
        )
    states = is_open.int() + directory.sealed.int() + directory.on_host.int()
    if bool((states > 1).any()):
        problems.append("a page is in more than one of open, sealed and on the host")
    has_frames = directory.sealed | directory.on_host
    if bool((has_frames & (directory.quality == Quality.LOSSLESS)).any()):
        problems.append("a page of a lossless request is sealed")
    if bool(((directory.demotions > 0) & ~has_frames).any()):
        problems.append("a page that is not sealed counts as demoted")
    return problems


def _check_sums(store: PageStore) -> list[str]:
    """The ledger and the totals, against sums over all pages in use."""
    opened, fresh, demoted = OpenShare(0, 0, 0, 0), Share(0, 0), Share(0, 0)
    host_pages = host_used = 0
    by_quality: Counter[Quality] = Counter()
    by_plan: Counter[int] = Counter()
    recount = Totals(store.num_layers, str(store.directory.heads.device))
    d, ledger = store.directory, store.ledger
    for pages in _slices(store):
        in_use = pages[d.in_use[pages]]
        states = PageStates(read_states(d, in_use))
        opened = OpenShare(*map(sum, zip(opened, states.open_share(), strict=True)))
        fresh = Share(*map(sum, zip(fresh, states.sealed_share(demoted=False), strict=True)))
        demoted = Share(*map(sum, zip(demoted, states.sealed_share(demoted=True), strict=True)))
        for on_host in (states.host_share(demoted=x) for x in (False, True)):
            host_pages, host_used = host_pages + on_host.pages, host_used + on_host.frames
        by_quality += states.by_quality()
        by_plan += states.by_plan()
        sealed = in_use[d.sealed[in_use]]
        recount.add_payload(d.heads[:, sealed], (d.frames[:, sealed] >= 0).sum(2))
    real = {
        "open_pages": opened.pages,
        "full_pages": opened.full,
        "open_tokens": opened.tokens,
        "never_compressed": opened.never_compressed,
        "sealed_pages": fresh.pages + demoted.pages,
        "frames_used": fresh.frames + demoted.frames,
        "demoted_pages": demoted.pages,
        "demoted_frames": demoted.frames,
        "host_pages": host_pages,
        "host_used": host_used,
    }
    problems = [
        f"ledger: {name} is {getattr(ledger, name)}, really {value}"
        for name, value in real.items()
        if getattr(ledger, name) != value
    ]
    totals = store.totals
    if (+totals.by_quality, +totals.by_plan) != (by_quality, by_plan):
        problems.append("totals: pages by quality or by plan are not what the pages say")
    if totals.by_layer() != recount.by_layer():
        problems.append("totals: tiers or frames by layer are not what the pages say")
    return problems
