# SPDX-License-Identifier: Apache-2.0
"""Invariants of directory + arena + raw pages + ledger, as code."""

from __future__ import annotations

import torch

from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.ranks import alone
from sglang_diffxkv.pool.store import PageStore


def check_integrity(store: PageStore) -> list[str]:
    """Recompute the state from the tables; returns violations, empty when healthy."""
    return [*_check_frames(store), *_check_raw_pages(store), *_check_ledger(store)]


def _check_frames(store: PageStore) -> list[str]:
    directory, arena = store.directory, store.arena
    total = arena.stack.numel()
    num_free = int(arena.num_free)
    owned = directory.frames[directory.frames >= 0].long()
    everything = torch.cat([arena.stack[:num_free].long(), owned])
    problems = []
    if everything.numel() != total or torch.unique(everything).numel() != total:
        problems.append(
            f"frames: {num_free} free + {owned.numel()} owned are not the {total} frames, each once"
        )
    stray = directory.frames[:, ~directory.sealed]
    if bool((stray >= 0).any()):
        problems.append("frames: a page that is not sealed owns frames")
    pages = torch.arange(directory.num_pages + 1, device=directory.frames.device)
    unowned = directory.num_frames - directory.owned(pages)
    if bool((unowned < 0).any()):
        problems.append("frames: a page has more than it is charged for")
    if store.agree is alone and bool((unowned > 0).any()):
        problems.append("frames: a page is charged for more than it has")
    if bool((directory.num_frames[~directory.sealed] != 0).any()):
        problems.append("frames: a page that is not sealed is charged for some")
    if int(directory.num_frames.max()) > store.ledger.worst_frames:
        problems.append("frames: a page is charged for more than it was promised")
    return problems


def _check_raw_pages(store: PageStore) -> list[str]:
    directory, raw = store.directory, store.raw
    problems = []
    is_open = directory.raw_slot >= 0
    pages = torch.nonzero(is_open).flatten()
    slots = directory.raw_slot[pages].long()
    if not torch.equal(raw.page[slots].long(), pages):
        problems.append("raw pages: directory and slots disagree about owners")
    everything = torch.cat([raw.stack[: raw.num_free], slots])
    total = raw.page.numel()
    if everything.numel() != total or torch.unique(everything).numel() != total:
        problems.append(
            f"raw pages: {raw.num_free} free + {slots.numel()} owned are not the {total} slots"
        )
    if bool((is_open & directory.sealed).any()):
        problems.append("a page is both open and sealed")
    if bool((directory.sealed & (directory.quality == Quality.LOSSLESS)).any()):
        problems.append("a page of a lossless request is sealed")
    return problems


def _check_ledger(store: PageStore) -> list[str]:
    directory, ledger = store.directory, store.ledger
    is_open = directory.raw_slot[1:] >= 0
    demoted = directory.demotions > 0
    real = {
        "open_pages": int(is_open.sum()),
        "sealed_pages": int(directory.sealed.sum()),
        "frames_used": int(directory.num_frames.sum()),
        "raw_only": int((is_open & (directory.quality[1:] == Quality.LOSSLESS)).sum()),
        "demoted_pages": int(demoted.sum()),
        "demoted_frames": int(directory.num_frames[demoted].sum()),
    }
    problems = [
        f"ledger: {name} is {getattr(ledger, name)}, really {value}"
        for name, value in real.items()
        if getattr(ledger, name) != value
    ]
    if bool((demoted & ~directory.sealed).any()):
        problems.append("a page that is not sealed counts as demoted")
    if ledger.frames_free < 0:
        problems.append(f"ledger: {-ledger.frames_free} frames more promised than there are")
    if int(store.arena.num_free) < ledger.frames_total - ledger.frames_used:
        problems.append("ledger: the arena has fewer frames free than are counted as free")
    return problems
