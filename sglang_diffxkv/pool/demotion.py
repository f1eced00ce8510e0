# SPDX-License-Identifier: Apache-2.0
"""Graded eviction: cold sealed pages lose tiers before prefixes are evicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout import (
    HIGH,
    LOW,
    PAGE_TOKENS,
    decode_importance,
    head_counts,
    measure,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, copy_rows, pack, unpack
from sglang_diffxkv.kernels.pages import SealedTables
from sglang_diffxkv.policy.demotion import MAX_DEMOTIONS, DemotionContext
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.store import PageStore

WINDOWS = 4
"""Of `recency.SEALED_WINDOW` pages, searched together: what is cold in one may be warm beside
others."""


def demote_cold(store: PageStore, held_since: int, headroom: int) -> None:
    """Demote cold pages, in batches, until frames allow ``headroom`` pages to be opened.

    Args:
        held_since: the step since which every page that a request holds has been used.
    """
    windows = store.recency.sealed_hand.windows(WINDOWS)
    for pages in _batches(store, cold_pages(store, windows, held_since)):
        if store.ledger.frame_headroom >= headroom:
            return
        demote(store, pages)


def cold_pages(store: PageStore, windows: Iterable[slice], held_since: int) -> torch.Tensor:
    """The pages of some windows of the directory that may be demoted, coldest first; int64 [N].

    Only the half of the sealed, unheld ones that was read longest ago is cold: recently used
    prefixes keep their tiers, however often memory runs short, and one that came back into use what
    demotion has left it. Those of requests that asked for high quality are left out.
    """
    d = store.directory
    pages = coldest_first(store, torch.cat([unheld(store, x, held_since) for x in windows]))
    cold = pages[: pages.numel() // 2]
    return cold[(d.demotions[cold] < MAX_DEMOTIONS) & (d.quality[cold] != Quality.HIGH)]


def unheld(store: PageStore, window: slice, held_since: int) -> torch.Tensor:
    """Sealed pages in a window of the directory that no request holds; int64 [N]."""
    d = store.directory
    found = d.sealed[1:][window] & (d.last_used[1:][window] < held_since)
    return found.nonzero().flatten() + 1 + window.start


def coldest_first(store: PageStore, pages: torch.Tensor) -> torch.Tensor:
    """``pages`` (int64 [N]) by when they were last read; of those of one step, the later ones of a
    sequence come first, as in eviction."""
    d = store.directory
    pages = pages[d.position[pages].argsort(descending=True, stable=True)]
    return pages[d.last_used[pages].argsort(stable=True)]


def _batches(store: PageStore, pages: torch.Tensor) -> Iterator[torch.Tensor]:
    """Those demoted least often first, each as often as it may be."""
    for demotions in range(MAX_DEMOTIONS):
        at_level = pages[store.directory.demotions[pages] == demotions]
        yield from at_level.split(store.sizes.workspace.demoted_pages)


def demote(store: PageStore, pages: torch.Tensor) -> None:
    """Give sealed ``pages`` (int64 [N], distinct, not at their floor) smaller payloads.

    What the policy grades down is quantised again from what is left of it; all else stays as it is,
    bit for bit. Frames are given back before fewer are taken, so this needs none.
    """
    d = store.directory
    store.wait_for_host()
    fresh = store.share(pages[d.demotions[pages] == 0])
    before = d.num_frames[pages]
    for layer in range(store.num_layers):
        _demote_layer(store, layer, pages)
    # Which pages were repacked differs between ranks, what is allocated to them must not: no rank
    # has more of a page than before, so neither has the one that has most of it.
    d.num_frames[pages] = store.agree(d.owned(pages))
    freed = before - d.num_frames[pages]
    d.demotions[pages] += 1
    frames = int(freed.sum())
    store.ledger.demote(fresh, frames)
    store.counters.demoted += int((freed > 0).sum())
    store.counters.frames_demoted += frames


def _demote_layer(store: PageStore, layer: int, pages: torch.Tensor) -> None:
    """Repack the pages of which that saves frames; the others keep their payload of this layer."""
    d, layout, arena = store.directory, store.layout, store.arena
    tokens = read_tokens(store, layer, pages)
    context = DemotionContext(
        layer=layer,
        tiers=tokens.tiers,
        importance=decode_importance(tokens.codes).masked_fill(tokens.codes == 0, 0),
        position=d.position[pages].long(),
        demotions=d.demotions[pages].long(),
    )
    tiers = store.policy.demote(context)
    heads, nbytes = measure(tiers, layout)
    counts = -(-nbytes // layout.frame_bytes)
    shrinks = counts < (d.frames[layer, pages] >= 0).sum(dim=1)
    if store.retention is not None:
        kept = tiers.where(shrinks[:, None, None], tokens.tiers)
        store.retention.demote(context, kept, d.context[pages])
    slots = torch.nonzero(shrinks).flatten()
    old = _copy_payload(store, layer, pages[slots])
    arena.give_back(d.frames[layer, pages[slots]])
    freed = (d.frames[layer, pages[slots]] >= 0).sum(1) - counts[slots]
    store.totals.replace_payload(layer, d.heads[layer, pages[slots]], heads[slots], freed)
    frames = arena.take(counts[slots], layout.max_frames)
    new = SealedTables(arena.buffer, frames, heads[slots], layout)
    grades = Grades(tiers[slots], tokens.codes[slots])
    pack(RawTokens(tokens.keys, tokens.values, slots), grades, new)
    copy_rows(old, tokens.tiers[slots], new, grades.tiers)
    d.replace(layer, pages[slots], frames, new.heads)


def _copy_payload(store: PageStore, layer: int, pages: torch.Tensor) -> SealedTables:
    """A copy of the payload of ``pages`` (int64 [S]), in an arena of its own."""
    d = store.directory
    frames = d.frames[layer, pages]
    arena = store.arena.buffer[frames.flatten().clamp(min=0).long()]
    own = torch.arange(frames.numel(), dtype=torch.int32, device=frames.device)
    return SealedTables(arena, own.view_as(frames), d.heads[layer, pages], store.layout)


class GradedTokens(NamedTuple):
    """All tokens of S sealed pages of one layer, as they are stored.

    Attributes:
        keys, values: [S, 64, H, D].
        tiers: uint8 [S, H, 64]. codes: uint8 [S, H, 64], `encode_importance`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tiers: torch.Tensor
    codes: torch.Tensor


def read_tokens(store: PageStore, layer: int, pages: torch.Tensor) -> GradedTokens:
    """Dequantised tokens of sealed ``pages`` (int64 [N]) of one layer, at their positions.

    Fp32; where a tier is raw, the model's dtype, which packing that needs. Pruned tokens are zeros.
    """
    d, layout, raw_dtype = store.directory, store.layout, store.raw.keys[0].dtype
    dtype = raw_dtype if layout.high.is_raw or layout.low.is_raw else torch.float32
    stored = unpack(store.sealed_tables(layer), pages, dtype, raw_dtype)
    page, head, place = stored.kept.nonzero().unbind(1)
    token = stored.position[page, head, place].long()

    n_high, _ = head_counts(d.heads[layer, pages])
    by_token = (pages.numel(), PAGE_TOKENS, layout.num_kv_heads)
    by_head = (pages.numel(), layout.num_kv_heads, PAGE_TOKENS)
    keys, values = stored.k.new_zeros((2, *by_token, layout.head_dim))
    keys[page, token, head] = stored.k[page, head, place]
    values[page, token, head] = stored.v[page, head, place]
    tiers, codes = stored.importance.new_zeros((2, *by_head))
    tiers[page, head, token] = torch.where(place < n_high[page, head], HIGH, LOW).to(tiers.dtype)
    codes[page, head, token] = stored.importance[page, head, place]
    return GradedTokens(keys, values, tiers, codes)
