# SPDX-License-Identifier: Apache-2.0
"""Invariants of directory + arena + raw pages + ledger, as code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from sglang_diffxkv.policy.quality import Quality
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
    directory, arena = store.directory, store.arena
    owners = torch.zeros(arena.stack.numel(), dtype=torch.uint8)
    num_free = int(arena.num_free)
    owners.index_add_(0, arena.free_ids().cpu(), torch.ones(num_free, dtype=torch.uint8))
    owned, found = 0, set()
    for pages in _slices(store):
        sealed, allocated = directory.sealed[pages], directory.num_frames[pages]
        frames = directory.frames[:, pages[sealed]]
        ids = frames[frames >= 0].long().cpu()
        owned += len(ids)
        owners.index_add_(0, ids, torch.ones(len(ids), dtype=torch.uint8))
        unowned = allocated[sealed] - directory.owned(pages[sealed])
        if bool((unowned < 0).any()):
            found.add("frames: a page has more than are allocated to it")
        if store.agree is alone and bool((unowned > 0).any()):
            found.add("frames: a page has fewer than are allocated to it")
        if bool((allocated[~sealed] != 0).any()):
            found.add("frames: some are allocated to a page that is not sealed")
        if bool((allocated > store.ledger.worst_frames).any()):
            found.add("frames: more are allocated to a page than it reserved")
        if bool(directory.heads[:, pages[~sealed]].any()):
            found.add("a page that is not sealed has a payload")
    if not bool((owners == 1).all()):
        found.add(
            f"frames: {num_free} free + {owned} owned are not the {len(owners)} frames, each once"
        )
    if num_free < store.ledger.frames_total - store.ledger.frames_used:
        found.add("ledger: the arena has fewer frames free than are counted as free")
    return sorted(found)


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
    if bool((is_open & directory.sealed).any()):
        problems.append("a page is both open and sealed")
    if bool((directory.sealed & (directory.quality == Quality.LOSSLESS)).any()):
        problems.append("a page of a lossless request is sealed")
    if bool(((directory.demotions > 0) & ~directory.sealed).any()):
        problems.append("a page that is not sealed counts as demoted")
    return problems


def _check_sums(store: PageStore) -> list[str]:
    """The ledger and the totals, against sums over all pages in use."""
    opened, fresh, demoted = OpenShare(0, 0, 0, 0), Share(0, 0), Share(0, 0)
    by_quality: Counter[Quality] = Counter()
    by_plan: Counter[int] = Counter()
    recount = Totals(store.num_layers, str(store.directory.heads.device))
    d, ledger = store.directory, store.ledger
    for pages in _slices(store):
        in_use = pages[(d.raw_slot[pages] >= 0) | d.sealed[pages]]
        states = PageStates(read_states(d, in_use))
        opened = OpenShare(*map(sum, zip(opened, states.open_share(), strict=True)))
        fresh = Share(*map(sum, zip(fresh, states.sealed_share(demoted=False), strict=True)))
        demoted = Share(*map(sum, zip(demoted, states.sealed_share(demoted=True), strict=True)))
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
