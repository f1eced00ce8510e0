# SPDX-License-Identifier: Apache-2.0
"""Decode steps as the GPU does them, against those of the host: same attention, same notes."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.attention.batch_pages import gather_pages, note_use, page_table
from sglang_diffxkv.attention.decode_batch import StepTokens
from sglang_diffxkv.attention.device_decode import DeviceDecode
from sglang_diffxkv.attention.full_pages import FullPages
from sglang_diffxkv.attention.scoring import ScoringSample, count_scores
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.decode import decode_open, decode_sealed
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import merge_states
from sglang_diffxkv.kernels.score import ScoringQueries, score_open
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStore
from tests.support.builders import error_norm
from tests.support.device import as_on_gpu
from tests.support.stores import STORE, make_store

LAYERS, HEADS, DIM, _ = STORE
WINDOW, GROUP, SOFTMAX = 64, 4, Softmax(0.125)
LENGTHS, SEALED = [130, 64, 1, 330], [1, 0, 0, 4]


class World:
    """A store with a batch of sequences, some of whose pages are sealed; made alike each time."""

    def __init__(self, policy: str) -> None:
        gen = torch.Generator().manual_seed(5)
        self.store: PageStore = make_store(policy, 24 << 20)
        self.lens = torch.tensor(LENGTHS)
        self.rows = torch.tensor([4, 1, 6, 2])
        self.req_to_token = torch.zeros(8, 512, dtype=torch.int32)
        raw = self.store.raw
        for tensor in (*raw.keys, *raw.values):
            tensor.copy_(torch.randn(tensor.shape, generator=gen))
        for keys in raw.keys:  # so that sealed ones lack a mean
            keys += 3 * torch.randn(keys.shape[2:], generator=gen)
        raw.scores.copy_(torch.rand(raw.scores.shape, generator=gen))
        next_page, sealed = 3, []
        for row, length, n in zip(self.rows.tolist(), LENGTHS, SEALED, strict=True):
            own = torch.arange(next_page, next_page + -(-length // PAGE_TOKENS))
            next_page += len(own)
            token = own[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
            self.req_to_token[row, :length] = token.flatten()[:length].int()
            sealed.append(own[:n])
        self.store.open(torch.arange(3, next_page))
        first = torch.cat(sealed)
        self.store.ledger.commit(len(first) * PAGE_TOKENS, full=len(first))
        self.store.directory.filled[first] = PAGE_TOKENS
        seal(self.store, first)
        assert self.store.key_means.by_layer.any() == self.store.layout.rotates
        self.store.begin_step(decodes=True)
        self.queries = torch.randn(4, HEADS * GROUP, DIM, generator=gen)

    def on_host(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention, then scores, as `backend` computes them."""
        store, q = self.store, self.queries
        table = page_table(self.req_to_token, self.rows, max(LENGTHS))
        pages = gather_pages(store, table, self.lens)
        if layer == 0:
            note_use(store, pages, self.lens, WINDOW)
        raw = store.raw
        opened = pages.opened.of(raw.keys[layer], raw.values[layer])
        part = decode_open(q, opened, pages.last_len, SOFTMAX)
        tables = store.layer_pages(layer).tables
        q_sealed = rotate(q) if store.layout.rotates else q
        sealed = tables.listed(*pages.sealed)
        found = decode_sealed(q_sealed, sealed, SOFTMAX)
        if store.layout.rotates:
            found = from_sealed(found, q, store.key_means.by_layer[layer], SOFTMAX)
        part = merge_states(part, found)
        if store.policy.needs_scores:
            scoring = ScoringSample.at(None, torch.arange(5, dtype=torch.int32), self.lens - 1)
            lse = part.lse - scoring.log2_seen
            queries = ScoringQueries(q, lse, scoring.indptr, scoring.position)
            score_open(queries, opened, raw.scores[layer], SOFTMAX)
            if layer == 0:
                count_scores(store, pages, scoring)
        return part.out, part.lse


@pytest.mark.parametrize("policy", ["diffxkv", "uniform", "lossless"])
def test_a_step_equals_the_hosts(policy: str) -> None:
    host, device = World(policy), World(policy)
    decode = DeviceDecode(device.store, device.req_to_token, WINDOW)
    decode.tick(num_real=4)
    padding = torch.zeros(2, dtype=torch.int64)  # as SGLang pads batches for CUDA graphs
    rows, lens = torch.cat([device.rows, padding]), torch.cat([device.lens, padding + 1])
    last = device.req_to_token[device.rows, device.lens - 1].long()
    with as_on_gpu():
        step = decode.begin(StepTokens(rows, lens, 1))
    assert torch.equal(step.pages.rows, torch.cat([device.store.write_rows(last), padding]))
    for layer in range(LAYERS):
        q = torch.cat([device.queries, torch.full((2, HEADS * GROUP, DIM), 9.0)])
        q = torch.cat([q, torch.full((6, 3, DIM), torch.nan)], dim=1)[:, : HEADS * GROUP]
        raw = (pages[layer].flatten(0, 1) for pages in (host.store.raw.keys, host.store.raw.values))
        new = [x[step.pages.rows] for x in raw]
        for pages in (device.store.raw.keys, device.store.raw.values):
            pages[layer].flatten(0, 1)[step.pages.rows] = torch.nan
        with as_on_gpu():
            part = decode.attend(layer, q, *new, SOFTMAX)
        out, lse = host.on_host(layer)
        assert error_norm(part.out[:4], out) < 1e-3
        assert (part.lse[:4] - lse).abs().max() < 1e-3
        assert not part.out[4:].any() and part.lse[4:].isneginf().all()
        scores, expected = device.store.raw.scores[layer], host.store.raw.scores[layer]
        assert error_norm(scores, expected) < 1e-3
    for name in ("position", "context", "filled", "window_step", "last_used"):
        mine, theirs = (getattr(w.store.directory, name) for w in (device, host))
        assert torch.equal(mine, theirs), name
    assert torch.equal(device.store.raw.counts, host.store.raw.counts)


def test_when_decode_steps_seal() -> None:
    full_pages = FullPages(WINDOW, needs_scores=False)

    def due(ends: torch.Tensor) -> float:
        return full_pages.due(ends - 1, ends)

    inside, leaving, again = torch.tensor([100] * 16), torch.tensor([128] * 16), torch.tensor([191])
    assert not due(inside)
    assert due(leaving)
    assert not due(inside)
    one = inside.clone()
    one[3] = 192
    assert not due(one)  # two of 16 are worth the wait, one is not
    assert due(one)
    assert not due(again)
    full_pages.expect_any()
    assert due(again)


@pytest.mark.parametrize(("needs_scores", "full"), [(False, 64), (True, 65)])
def test_without_a_window_pages_seal_once_full_and_scored(needs_scores: bool, full: int) -> None:
    full_pages = FullPages(0, needs_scores)
    sealing = [n for n in range(1, 140) if full_pages.due(*torch.tensor([[n - 1], [n]]))]
    assert sealing == [full, full + PAGE_TOKENS]
