# SPDX-License-Identifier: Apache-2.0
"""Payload of sealed pages as plain memory, which outlives the page, the pool and the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.arena import copy_frames
from sglang_diffxkv.kernels.gpu.transfer import Download, upload
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.arena import FrameArena
from sglang_diffxkv.pool.ledger import Share
from sglang_diffxkv.pool.offload import host_of
from sglang_diffxkv.pool.store import PageStore


class PagePayload(NamedTuple):
    """A sealed page, on the host.

    Attributes:
        heads: int32 [L, H, 2], its records. counts: int32 [L], its frames in each layer.
        frames: uint8 [sum of counts, frame_bytes], layer by layer.
        facts: int32 [F], what else the directory says of it (`FACTS`).
    """

    heads: torch.Tensor
    counts: torch.Tensor
    frames: torch.Tensor
    facts: torch.Tensor


FACTS = ("position", "context", "plan", "quality", "demotions")
"""Columns of the directory."""


def read_payload(store: PageStore, pages: torch.Tensor) -> list[PagePayload]:
    """Of ``pages`` (int64 [N], sealed or on the host); waits for the device."""
    d, layout = store.directory, store.layout
    if not len(pages):
        return []
    store.wait_for_host()
    frames, heads, counts = d.frames[:, pages], d.heads[:, pages], d.frame_counts(pages)
    on_host, places = d.on_host[pages], _places(counts, layout.max_frames)
    staging = _staging(int(counts.sum()), layout.frame_bytes, frames.device)

    def copy(arena: FrameArena, there: torch.Tensor) -> None:
        old, new = (x.masked_fill(~there[:, None], -1) for x in (frames, places))
        copy_frames(arena.buffer, old, staging, new)

    copy(store.arena, ~on_host)
    if store.host is not None:
        copy(store.host.arena, on_host)
        heads = torch.where(on_host[:, None, None], store.host.heads[:, pages], heads)
    facts = torch.stack([getattr(d, name)[pages].int() for name in FACTS], dim=1)
    arrived = [Download(x) for x in (heads.transpose(0, 1), counts.T, facts)]
    heads, counts, facts = (download.values() for download in arrived)  # behind the frames
    sizes = counts.sum(1).tolist()
    return list(map(PagePayload, heads, counts, staging.split(sizes), facts))


def adopt(store: PageStore, pages: torch.Tensor, payload: Sequence[PagePayload]) -> None:
    """Free ``pages`` (int64 [N], distinct) become pages on the host with that ``payload``.

    Raises:
        RuntimeError: the host has no room for them.
    """
    d, layout, host, device = store.directory, store.layout, host_of(store), pages.device
    if not payload:
        return
    counts = torch.stack([page.counts for page in payload], dim=1)  # [L, N]
    allocated = store.agree(counts.sum(0, dtype=torch.int32))
    share = Share(len(pages), int(allocated.sum()))
    if share.frames > store.ledger.host_free:
        free = store.ledger.host_free
        raise RuntimeError(f"{share.frames} frames to adopt, {free} free on the host")
    staging = _staging(int(counts.sum()), layout.frame_bytes, device)
    torch.cat([page.frames for page in payload], out=staging)
    places = _places(counts, layout.max_frames)
    taken = host.arena.take(upload(counts.flatten(), device), layout.max_frames)
    taken = taken.view(places.shape)
    host.loading.wait_all()  # frames that were just given back are still being read
    copy_frames(staging, upload(places, device), host.arena.buffer, taken)
    host.loading.keep(staging)
    host.heads[:, pages] = upload(torch.stack([page.heads for page in payload], dim=1), device)
    facts = torch.stack([page.facts for page in payload])
    for name, column in zip(FACTS, facts.unbind(1), strict=True):
        table = getattr(d, name)
        table[pages] = upload(column.to(table.dtype), device)
    d.num_frames[pages] = upload(allocated, device)
    d.last_used.index_fill_(0, pages, store.recency.step)
    d.offload(pages, taken)
    store.ledger.take_in_host(share)
    _count(store, facts)
    store.counters.prefetched += len(pages)


def _places(counts: torch.Tensor, max_frames: int) -> torch.Tensor:
    """Where frames lie that are put page after page, and of a page layer after layer.

    Args:
        counts: int32 [L, N].

    Returns:
        int32 [L, N, max_frames], -1 where unused.
    """
    ends = counts.T.flatten().cumsum(0).view(counts.shape[::-1]).T
    column = torch.arange(max_frames, device=counts.device)
    places = (ends - counts)[:, :, None] + column
    return places.masked_fill(column >= counts[:, :, None], -1).int()


def _staging(frames: int, frame_bytes: int, device: torch.device) -> torch.Tensor:
    pinned = device.type == "cuda"
    return torch.empty(frames, frame_bytes, dtype=torch.uint8, pin_memory=pinned)


def _count(store: PageStore, facts: torch.Tensor) -> None:
    by_name = dict(zip(FACTS, facts.T.tolist(), strict=True))
    store.totals.by_quality.update(map(Quality, by_name["quality"]))
    store.totals.by_plan.update(Counter(by_name["plan"]))
