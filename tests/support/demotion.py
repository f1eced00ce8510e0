# SPDX-License-Identifier: Apache-2.0
"""Sealed pages of all importances to demote, and what is left of their tokens."""

from __future__ import annotations

from typing import Any

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.demotion import GradedTokens, read_tokens
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStore
from tests.support.pages import write
from tests.support.stores import make_store

Contents = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [N, 64, H, D] of each layer."""


def sealed_store(pages: int, **config: Any) -> tuple[PageStore, torch.Tensor, Contents]:
    """A store with the pages 1, 2, ... of one sequence, sealed in one step, and their contents."""
    store = make_store("diffkv", 36 << 20, **config)
    ids = torch.arange(1, pages + 1)
    contents = fill(store, ids)
    write(store, ids, torch.arange(pages), torch.full((pages,), pages * PAGE_TOKENS + 70))
    seal(store, ids)
    store.begin_step(decodes=True)
    return store, ids, contents


def fill(store: PageStore, pages: torch.Tensor) -> Contents:
    """Open pages and write random tokens of all importances to them, the same in each run."""
    gen = torch.Generator().manual_seed(len(pages))
    store.open(pages)
    slots = store.directory.raw_slot[pages].long()
    for raw in (*store.raw.keys, *store.raw.values):
        raw[slots] = torch.randn(raw[slots].shape, generator=gen) + 5
    spread = torch.rand(store.raw.scores[:, slots].shape, generator=gen)
    store.raw.scores[:, slots] = 10 ** (3 * spread - 2)
    store.raw.counts[slots] = 2
    return [
        (keys[slots], values[slots])
        for keys, values in zip(store.raw.keys, store.raw.values, strict=True)
    ]


def tokens_of(store: PageStore, pages: torch.Tensor) -> list[GradedTokens]:
    return [read_tokens(store, layer, pages) for layer in range(store.num_layers)]
