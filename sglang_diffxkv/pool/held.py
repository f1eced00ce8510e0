# SPDX-License-Identifier: Apache-2.0
"""What each running request holds, for those who look."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.running import RunningRequests
from sglang_diffxkv.pool.store import PageStore


class Held(NamedTuple):
    """Of one request; pages that it shares with others count for each of them.

    Attributes:
        tokens: committed ones.
        bytes: of its raw pages and frames.
    """

    tokens: int
    open_pages: int
    sealed_pages: int
    bytes: int


class HeldPages(NamedTuple):
    """int64 [N] each, on the device: pages, and whose they are, as the how many-th of the requests.

    Those of several requests are there several times.
    """

    page: torch.Tensor
    owner: torch.Tensor


def held_pages(running: RunningRequests, req_to_token: torch.Tensor) -> HeldPages:
    """Pages of the committed tokens of all running requests; does not wait for the device.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
    """
    indices = list(running.by_index)
    tokens = torch.tensor([running.tokens(index) for index in indices], dtype=torch.int64)
    pages = -(-tokens // PAGE_TOKENS)
    owner = torch.repeat_interleave(torch.arange(len(indices)), pages)
    positions = (torch.arange(len(owner)) - (pages.cumsum(0) - pages)[owner]) * PAGE_TOKENS
    rows = torch.tensor(indices, dtype=torch.int64)[owner]
    owner, rows, positions = upload(torch.stack([owner, rows, positions]), req_to_token.device)
    return HeldPages(req_to_token[rows, positions].long() // PAGE_TOKENS, owner)


def held(store: PageStore, running: RunningRequests, req_to_token: torch.Tensor) -> dict[int, Held]:
    """What each running request holds, by ``req_pool_index``.

    Costs O(pages held), and waits for the device.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
    """
    (page, owner), d = held_pages(running, req_to_token), store.directory
    indices = list(running.by_index)
    is_open, is_sealed = d.raw_slot[page] >= 0, d.sealed[page]
    counts = torch.stack([is_open.long(), is_sealed.long(), d.num_frames[page] * is_sealed])
    sums = torch.zeros(3, len(indices), dtype=torch.int64, device=page.device)
    by_request = sums.index_add_(1, owner, counts).T.tolist()
    return {
        index: Held(running.tokens(index), opened, sealed, store.page_bytes(frames, opened))
        for index, (opened, sealed, frames) in zip(indices, by_request, strict=True)
    }
