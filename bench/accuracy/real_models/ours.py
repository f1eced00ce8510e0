# SPDX-License-Identifier: Apache-2.0
"""A prompt's pages, sealed by the code that a server runs: page store, scores, policy, payloads.

Raw elements are counted as those of bf16. Pages of quantizing policies are sealed from fp32, those
of policies that keep raw tokens are bf16.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from bench.accuracy.real_models.protocol import WINDOW
from bench.accuracy.real_models.reader import LayerPrefix, Prefix, States
from sglang_diffxkv.attention.batch_pages import BatchPages, gather_pages, note_use, page_table
from sglang_diffxkv.attention.ready_pages import pages_to_seal
from sglang_diffxkv.attention.scoring import (
    NewTokens,
    ScoringSample,
    count_scores,
    extend_queries,
)
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.eval.variants import ITEMSIZE
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout, head_counts
from sglang_diffxkv.kernels.pack import unpack
from sglang_diffxkv.kernels.pages import SealedTables
from sglang_diffxkv.kernels.score import ScoringQueries, score_open
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.registry import make_policy
from sglang_diffxkv.pool.directory import PageDirectory
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.sizing import FREE_LIST_BYTES, PoolBudget, size_pool
from sglang_diffxkv.pool.store import PageStore

FRAME_ID_BYTES = 4
BUDGET = 4 << 30
"""Of a store, which takes what is written of it."""


class ModelShape(NamedTuple):
    """What a store depends on."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelShape:
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None:
            head_dim = config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim)

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in SGLang's own pool in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * ITEMSIZE


def entry_bytes(shape: ModelShape, layout: PageLayout) -> int:
    """Of a page in the directory and in SGLang's list of free ones."""
    return PageDirectory.bytes_per_page(shape.layers, layout) + FREE_LIST_BYTES


class Sealed(NamedTuple):
    """What is left of a prompt.

    Attributes:
        prefix: of all its tokens, the window's raw.
        nbytes: of what is not in the window: frames, their ids, entries of the directory, and raw
            pages that a longer window holds back.
        high, low: shares of the (token, head, layer) entries of sealed pages.
    """

    prefix: Prefix
    nbytes: float
    high: float
    low: float


class Sealer:
    """A store for one configuration, which learns from prompt to prompt as a server's does."""

    def __init__(
        self, config: DiffXKVConfig, shape: ModelShape, policy: TierPolicy | None = None
    ) -> None:
        """``policy``: in place of the one that ``config`` names."""
        self.config, self.shape = config, shape
        policy = policy or make_policy(
            config,
            head_dim=shape.head_dim,
            num_kv_heads=shape.kv_heads,
            raw_itemsize=ITEMSIZE,
            num_layers=shape.layers,
        )
        layout = policy.layout
        is_raw = layout.high.is_raw or layout.low.is_raw
        sizes = size_pool(PoolBudget(BUDGET, config.raw_share), layout, policy.caps, 1.0)
        dtype = torch.bfloat16 if is_raw else torch.float32
        self.store = PageStore(sizes, policy, dtype)

    def seal(self, states: States, window: int = WINDOW) -> Sealed:
        """All but the last `window` tokens of a prompt of n, both multiples of 64."""
        store, tokens = self.store, states.keys.shape[2]
        pages = torch.arange(tokens // PAGE_TOKENS) + 1
        slots = torch.arange(PAGE_TOKENS, tokens + PAGE_TOKENS, dtype=torch.int32)[None]
        lens = torch.tensor([tokens])
        store.begin_step(decodes=True)
        store.open(pages)
        batch = gather_pages(store, page_table(slots, torch.tensor([0]), tokens), lens)
        note_use(store, batch, lens, window)
        store.ledger.commit(tokens, full=len(pages))
        for layer in range(self.shape.layers):
            for raw, side in ((store.raw.keys, states.keys), (store.raw.values, states.values)):
                by_page = side[layer].transpose(0, 1).unflatten(0, (-1, PAGE_TOKENS))
                raw[layer][batch.opened.slots.long()] = by_page.to(raw[layer].dtype)
        if store.policy.needs_scores:
            self._score(states, batch)
        seal(store, *pages_to_seal(store, batch, lens))
        found = self._read(states, pages)
        store.clear()
        if hasattr(store.policy, "learner"):
            store.policy.learner.wait()
        return found

    def _score(self, states: States, batch: BatchPages) -> None:
        """As a prefill step does, of a prompt in one chunk."""
        tokens, scale = states.keys.shape[2], self.shape.head_dim**-0.5
        new = NewTokens(
            indptr=torch.tensor([0, tokens], dtype=torch.int32),
            positions=torch.arange(tokens),
            prefix_lens=torch.tensor([0]),
            lens=[tokens],
        )
        queries = extend_queries(new, self.config.score_queries, self.store.policy.sample)
        rows = torch.arange(tokens) if queries.rows is None else queries.rows
        raw = self.store.raw
        for layer in range(self.shape.layers):
            q = states.queries[layer, :, rows]
            lse = (_lse(q, states.keys[layer], queries, scale) - queries.log2_seen).contiguous()
            mine = q.transpose(0, 1).contiguous()
            score_open(
                ScoringQueries(mine, lse, queries.indptr, queries.position),
                batch.opened.of(raw.keys[layer], raw.values[layer]),
                raw.scores[layer],
                Softmax(scale),
            )
        count_scores(self.store, batch, queries)

    def _read(self, states: States, pages: torch.Tensor) -> Sealed:
        """All that the prompt's pages hold now."""
        d, layout = self.store.directory, self.store.layout
        sealed = pages[d.sealed[pages]]
        end = len(sealed) * PAGE_TOKENS
        prefix = []
        for layer in range(self.shape.layers):
            tables = SealedTables(self.store.arena.buffer, d.frames[layer], d.heads[layer], layout)
            found = unpack(tables, sealed, torch.float32, self.store.raw.keys[layer].dtype)
            keys, values = found.k, found.v
            if layout.rotates:
                mean = self.store.key_means.by_layer[layer][:, None]
                keys, values = rotate(keys) + mean, rotate(values)
            part = _in_order(keys, values, found.position, found.kept)
            open_tokens = states.keys[layer, :, end:], states.values[layer, :, end:]
            prefix.append(part.followed_by(*open_tokens))
        frames = int(d.num_frames[sealed].sum())
        entry = entry_bytes(self.shape, layout)
        held_back = states.keys.shape[2] - WINDOW - end
        nbytes = frames * (layout.frame_bytes + FRAME_ID_BYTES) + len(sealed) * entry
        high, low = (
            float(count.sum()) / max(1, count.numel() * PAGE_TOKENS)
            for count in head_counts(d.heads[:, sealed])
        )
        return Sealed(prefix, nbytes + held_back * self.shape.token_bytes, high, low)


def _lse(q: torch.Tensor, keys: torch.Tensor, queries: ScoringSample, scale: float) -> torch.Tensor:
    """Base-2 LSE [S, Hq] of causal attention of q [Hq, S, D] to keys [H, n, D]."""
    scores = q.unflatten(0, (len(keys), -1)) @ keys[:, None].transpose(-1, -2)
    later = torch.arange(keys.shape[1]) > queries.position[:, None]
    lse = (scores * scale).masked_fill(later, -torch.inf).logsumexp(-1)
    return lse.flatten(0, 1).T / math.log(2)


def _in_order(
    keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, kept: torch.Tensor
) -> LayerPrefix:
    """Rows of pages [N, H, 64, ...] in storage order, as tokens [H, N * 64, ...] in order."""
    page, head, row = kept.nonzero(as_tuple=True)
    token = page * PAGE_TOKENS + position[page, head, row].long()
    n, heads, _, dim = keys.shape
    out = keys.new_zeros(2, heads, n * PAGE_TOKENS, dim)
    out[0, head, token], out[1, head, token] = keys[page, head, row], values[page, head, row]
    mask = torch.zeros(heads, n * PAGE_TOKENS, dtype=torch.bool)
    mask[head, token] = True
    return LayerPrefix(out[0], out[1], None if bool(mask.all()) else mask)
