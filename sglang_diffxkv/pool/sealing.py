# SPDX-License-Identifier: Apache-2.0
"""Sealing: what is known about open pages is graded, and their payload written into frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_diffxkv.kernels.layout import PRUNED, encode_importance, measure
from sglang_diffxkv.kernels.pack import Grades, pack
from sglang_diffxkv.kernels.pages import SealedTables
from sglang_diffxkv.policy.base import SealContext
from sglang_diffxkv.pool.payload import tokens_to_seal

if TYPE_CHECKING:
    from sglang_diffxkv.pool.store import PageStore


def write_sealed(
    store: PageStore,
    pages: torch.Tensor,
    slots: torch.Tensor,
    sequence: torch.Tensor | None,
    ready: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grade and pack full open ``pages`` (int64 [S]), and point the directory at their payload.

    Args:
        slots: int64 [S], their raw pages. sequence: int64 [S], as `PageStore.seal` takes it.
        ready: bool [S], which of them really to seal; the others take no frames. None: all.

    Returns:
        int32 [S], the frames that each page is charged for.
    """
    layout, num_layers = store.layout, store.num_layers
    context = seal_context(store, pages, slots, sequence)
    if ready is not None:  # nothing is known of the others
        context = context._replace(
            importance=context.importance.masked_fill(~ready[:, None, None, None], 0),
            count=context.count * ready[:, None],
        )
    at_once = store.plan.workspace.packed_pages
    if layout.rotates and not store.counters.sealed:
        bits = layout.high.key_bits
        store.key_means.learn(
            store.raw, slots, context.position, ready, key_bits=bits, at_once=at_once
        )
    store.policy.observe(context)
    tiers = store.policy.assign(context)  # [S, L, H, 64]
    if ready is not None:
        tiers = tiers.masked_fill(~ready[:, None, None, None], PRUNED)
    if store.retention is not None:
        store.retention.add(context, tiers)
    # Code 0 stays with tokens that no query has scored, however little others got.
    scored = (context.count > 0)[:, None, None]
    codes = encode_importance(context.importance).clamp(min=1) * scored
    measured = measure(tiers, layout)
    counts = -(-measured.nbytes // layout.frame_bytes)  # [S, L]
    frames = store.arena.take(counts.reshape(-1).to(torch.int32), layout.max_frames)
    frames = frames.view(pages.numel(), num_layers, layout.max_frames)
    # Layers first, in one copy each: kernels take one layer's as they lie.
    tiers, codes, frames, heads = (
        x.transpose(0, 1).contiguous() for x in (tiers, codes, frames, measured.heads)
    )
    for layer in range(num_layers):
        for part in torch.arange(len(slots), device=slots.device).split(at_once):
            mean = store.key_means.by_layer[layer]
            raw = tokens_to_seal(store.raw, layout, layer, slots[part], mean)
            placed = frames[layer, part], heads[layer, part]
            tables = SealedTables(store.arena.buffer, *placed, layout)
            pack(raw, Grades(tiers[layer, part], codes[layer, part]), tables)
    store.totals.add_payload(heads, counts.T)
    # Tiers, and all that they follow from (scores, plans), are a rank's own; what the host goes
    # by from here on is the same on all ranks.
    charged = store.agree(counts.sum(dim=1, dtype=torch.int32))
    store.directory.seal(pages, frames, heads, charged)
    store.directory.plan.index_fill_(0, pages, store.policy.plan_number)
    return charged


def seal_context(
    store: PageStore, pages: torch.Tensor, slots: torch.Tensor, sequence: torch.Tensor | None
) -> SealContext:
    """What is known about open ``pages``; arguments as in `write_sealed`."""
    d = store.directory
    counts, context = store.raw.counts[slots], d.context[pages].long()
    scores = store.raw.scores[:, slots].transpose(0, 1)  # [S, L, H, 64]
    # Mean attention as if every query had seen the whole context: an early query spreads its
    # attention over fewer tokens, which must not make those look more important (DiffKV's
    # thresholds are multiples of 1 / N).
    uniform = counts.clamp(min=1) * context[:, None]
    return SealContext(
        importance=scores / uniform[:, None, None, :],
        count=counts,
        position=d.position[pages].long(),
        context=context,
        sequence=sequence,
        quality=d.quality[pages].long(),
    )
