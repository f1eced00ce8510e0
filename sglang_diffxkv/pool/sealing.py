# SPDX-License-Identifier: Apache-2.0
"""Sealing: what is known about open pages is graded, and their payload written into frames."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import to_sealed_keys
from sglang_diffxkv.kernels.gpu.transfer import Download
from sglang_diffxkv.kernels.layout import (
    PAGE_TOKENS,
    PRUNED,
    PageLayout,
    encode_importance,
    measure,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, pack
from sglang_diffxkv.kernels.pages import SealedTables
from sglang_diffxkv.policy.base import SealContext
from sglang_diffxkv.policy.importance.model import ImportanceModel
from sglang_diffxkv.pool.raw_pages import RawPages
from sglang_diffxkv.pool.store import PageStore
from sglang_diffxkv.pool.unsettled import PageStateError, Sealed


def seal(store: PageStore, pages: torch.Tensor, sequence: torch.Tensor | None = None) -> None:
    """Seal full open ``pages`` (int64 [N], distinct), as many at a time as there is room to grade.

    The policy assigns a tier to every (layer, head, token), payloads are packed into frames, and
    the raw pages are free again.

    Args:
        sequence: int64 [N], equal for pages of one sequence, which the policy may judge together;
            None: nothing is known, every page is judged by itself.

    Raises:
        PageStateError: a page is not open, not full or a lossless request's.
    """
    if pages.numel() == 0:
        return
    store.check_ids(pages)
    d = store.directory
    slots = d.raw_slot[pages].long()
    if not bool(((slots >= 0) & (d.filled[pages] == PAGE_TOKENS)).all()):
        raise PageStateError("seal: page is not open and full")
    if bool(d.never_compressed(pages).any()):
        raise PageStateError("seal: page is of a lossless request")
    if sequence is None:
        order = torch.arange(pages.numel(), device=pages.device)
    else:  # its pages stay together, as far as there is room to grade them together
        order = sequence.argsort(stable=True)
    for part in _batches(store, order):
        own = None if sequence is None else sequence[part]
        allocated = write_sealed(store, pages[part], slots[part], own)
        store.totals.by_plan[store.policy.plan_number] += len(part)
        store.raw.give_back(slots[part])
        store.ledger.seal(len(part), int(allocated.sum()))
        store.counters.sealed += len(part)


def seal_ready(store: PageStore, pages: torch.Tensor, ready: torch.Tensor) -> None:
    """`seal` where ``ready``, each page by itself, without waiting for the device.

    Args:
        pages: int64 [N]; those that are ready are open, full, distinct and no lossless ones.
        ready: bool [N].
    """
    pages = torch.where(ready, pages, store.directory.nowhere)
    slots = store.directory.raw_slot[pages].long().clamp(min=0)
    for part in _batches(store, torch.arange(pages.numel(), device=pages.device)):
        allocated = write_sealed(store, pages[part], slots[part], None, ready[part])
        store.raw.give_back(slots[part])
        sums = Download(torch.stack([ready[part].sum(), allocated.sum()]))
        store.unsettled.add(Sealed(store.recency.forward_passes, store.policy.plan_number, sums))
    if store.checks_use:
        store.settle()


def _batches(store: PageStore, order: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parts of ``order`` (int64 [N]) that there is room to grade at a time."""
    return order.tensor_split(max(1, -(-len(order) // store.sizes.workspace.graded_pages)))


def write_sealed(
    store: PageStore,
    pages: torch.Tensor,
    slots: torch.Tensor,
    sequence: torch.Tensor | None,
    ready: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grade and pack full open ``pages`` (int64 [S]), and point the directory at their payload.

    Args:
        slots: int64 [S], their raw pages. sequence: int64 [S], as `seal` takes it.
        ready: bool [S], which of them really to seal; the others take no frames. None: all.

    Returns:
        int32 [S], the frames allocated to each page.
    """
    layout, num_layers = store.layout, store.num_layers
    context = seal_context(store, pages, slots, sequence)
    if ready is not None:  # nothing is known of the others
        context = context._replace(
            importance=context.importance.masked_fill(~ready[:, None, None, None], 0),
            count=context.count * ready[:, None],
        )
    at_once = store.sizes.workspace.packed_pages
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
            raw = _tokens_to_seal(store.raw, layout, layer, slots[part], mean)
            placed = frames[layer, part], heads[layer, part]
            tables = SealedTables(store.arena.buffer, *placed, layout)
            pack(raw, Grades(tiers[layer, part], codes[layer, part]), tables)
    store.totals.add_payload(heads, counts.T)
    # Tiers, and all that they follow from (scores, plans), are a rank's own; what the host goes
    # by from here on is the same on all ranks.
    allocated = store.agree(counts.sum(dim=1, dtype=torch.int32))
    store.directory.seal(pages, frames, heads, allocated)
    store.directory.plan.index_fill_(0, pages, store.policy.plan_number)
    return allocated


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
    found = SealContext(
        importance=scores / uniform[:, None, None, :],
        count=counts,
        position=d.position[pages].long(),
        context=context,
        sequence=sequence,
        quality=d.quality[pages].long(),
    )
    if store.policy.importance is None:
        return found
    return found.with_prediction(_predict(store, store.policy.importance, slots))


def _predict(store: PageStore, model: ImportanceModel, slots: torch.Tensor) -> torch.Tensor:
    """What the tokens of raw pages at ``slots`` (int64 [S]) matter: float32 [S, L, H, 64]."""
    at_once = store.sizes.workspace.predicted_pages
    parts = []
    for slot in slots.split(at_once):
        layers = enumerate(zip(store.raw.keys, store.raw.values, strict=True))
        parts.append(torch.stack([model.predict(i, k[slot], v[slot]) for i, (k, v) in layers], 1))
    return torch.cat(parts)


def _tokens_to_seal(
    raw: RawPages, layout: PageLayout, layer: int, slots: torch.Tensor, key_mean: torch.Tensor
) -> RawTokens:
    """The raw pages at ``slots`` (int64 [S]) of one layer, in the basis of sealed pages.

    Args:
        key_mean: fp32 [H, D], of this layer, looked at where pages rotate.
    """
    keys, values = raw.keys[layer], raw.values[layer]
    if not layout.rotates:
        return RawTokens(keys, values, slots)
    rows = torch.arange(len(slots), device=slots.device)
    return RawTokens(to_sealed_keys(keys[slots], key_mean), rotate(values[slots].float()), rows)
