# SPDX-License-Identifier: Apache-2.0
"""Pages from the disk become pages on the host, in SGLang's radix tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.events import LevelEvents
from sglang_diffxkv.offload.keys import to_numbers
from sglang_diffxkv.offload.prefetch import Arrived, Prompt
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.payload import PagePayload, adopt


class Span(NamedTuple):
    """Tokens of a prompt."""

    start: int
    tokens: int


def adopt_arrived(
    tree: Any, allocator: DiffXKVAllocator, events: LevelEvents, arrived: Arrived
) -> Span:
    """Have as many of them in the tree as there is room for, behind what it has of the prompt.

    The tree may have got some of them meanwhile, or may have lost what comes before.

    Args:
        events: are told that the pages are on the host, and on disk.
    """
    last = arrived.first + len(arrived.payload)
    matched = tree.match_prefix(MatchPrefixParams(key=_key(arrived.prompt, last)))
    slots = tree.path_device_indices(matched.last_device_node).long()
    have = len(slots) // PAGE_TOKENS
    payload = arrived.payload[max(0, have - arrived.first) :] if have >= arrived.first else []
    if not payload:
        return Span(len(slots), 0)
    lock = tree.lock(matched.last_device_node)
    try:
        count = _make_room(tree, allocator, payload)
    finally:
        tree.unlock(lock)
    if not count:
        return Span(len(slots), 0)
    pages = allocator.take_free(count)
    adopt(allocator.store, pages, payload[:count])
    begin = have - arrived.first
    keys = arrived.keys[begin : begin + count]
    numbers = torch.from_numpy(to_numbers(b"".join(keys)))
    allocator.store.directory.key[pages] = upload(numbers, pages.device)
    token = torch.arange(PAGE_TOKENS, device=pages.device)
    new = (pages[:, None] * PAGE_TOKENS + token).flatten()
    with events.adopting():
        tree.insert(
            InsertParams(
                key=_key(arrived.prompt, have + count),
                value=torch.cat([slots.to(new.device), new]),
                prev_prefix_len=len(slots),
            )
        )
    events.backed_up(keys)
    return Span(len(slots), len(new))


def _key(prompt: Prompt, pages: int) -> RadixKey:
    tokens = prompt.tokens[: pages * PAGE_TOKENS]
    return RadixKey(tokens, prompt.extra_key, cache_salt=prompt.cache_salt)


def _make_room(tree: Any, allocator: DiffXKVAllocator, payload: list[PagePayload]) -> int:
    """For how many pages there is room on the host now, colder prefixes being evicted."""
    store, ledger = allocator.store, allocator.store.ledger
    counts = torch.tensor([int(page.counts.sum()) for page in payload])
    frames = store.agree(counts).cumsum(0)
    allocator.reclaimer.evict_until(tree, lambda: ledger.host_free >= int(frames[-1]))
    allocator.evict_to_free_tokens(tree, len(payload) * PAGE_TOKENS)
    return min(int((frames <= ledger.host_free).sum()), len(allocator.free_pages))
