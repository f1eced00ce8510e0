# SPDX-License-Identifier: Apache-2.0
"""Drafts that are verified, against the same tokens decoded one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_diffxkv.attention.host_backend import HostBackend
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.committed import _commit
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.unsettled import PageStateError
from tests.support.builders import error_norm
from tests.support.pages import running
from tests.support.policies import config_of
from tests.support.stores import ALLOCATOR, make_allocator

LAYERS, HEADS, DIM, _ = ALLOCATOR
GROUP, SCALE, WINDOW, LONGEST = 2, 0.125, 64, 1024


class Tokens:
    """Queries, keys and values of a sequence's tokens, by place; rejected drafts have others."""

    def __init__(self, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.accepted = torch.randn(LAYERS, LONGEST, (GROUP + 2) * HEADS * DIM, generator=gen)
        self.rejected = torch.randn(LAYERS, LONGEST, (GROUP + 2) * HEADS * DIM, generator=gen)

    def qkv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of all tokens: float64 [T, Hq, D], [T, H, D] twice."""
        sizes = [GROUP * HEADS * DIM, HEADS * DIM, HEADS * DIM]
        q, k, v = (x.unflatten(1, (-1, DIM)) for x in self.accepted[layer].double().split(sizes, 1))
        return q, k, v

    def attention(self, layer: int, places: range) -> torch.Tensor:
        """Float64 [len(places), Hq * D], over everything uncompressed."""
        q, k, v = self.qkv(layer)
        k, v = (x.repeat_interleave(GROUP, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[places], k[: places.stop]) * SCALE
        later = torch.arange(places.stop) > torch.tensor(places)[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v[: places.stop]).flatten(1)


class Runner:
    """As much of SGLang as runs requests with and without drafts."""

    def __init__(self, policy: str, num_tokens: int, requests: int = 1) -> None:
        self.allocator: DiffXKVAllocator = make_allocator(policy, 8, window=WINDOW)
        self.store, self.num_tokens = self.allocator.store, num_tokens
        self.table = torch.zeros(requests + 2, LONGEST, dtype=torch.int32)
        config = config_of(policy, window=WINDOW)
        self.backend = HostBackend(self.store, self.table, config, self.allocator.running)
        self.rows = list(range(1, requests + 1))
        self.tokens = [Tokens(seed) for seed in range(requests)]
        self.committed, self.allocated = [0] * requests, [0] * requests

    def enter(self, quality: Quality = Quality.BALANCED) -> None:
        self.allocator.running.enter(self.rows, [running(quality) for _ in self.rows])

    def _allocate(self, lens: list[int]) -> None:
        """Pages up to ``lens``, as SGLang has them."""
        before, after = torch.tensor(self.allocated), torch.tensor(lens)
        last = torch.tensor(
            [
                int(self.table[row, n - 1]) if n else -1
                for row, n in zip(self.rows, self.allocated, strict=True)
            ]
        )
        loc = self.allocator.alloc_extend(
            before, before, after, after, last, int((after - before).sum())
        )
        assert loc is not None
        for row, start, end in zip(self.rows, self.allocated, lens, strict=True):
            self.table[row, start:end] = loc[: end - start].int()
            loc = loc[end - start :]
        self.allocated = lens

    def _run(self, mode: ForwardMode, starts: list[int], ends: list[int], right: list[int]) -> Any:
        """A forward pass over the tokens at ``starts`` to ``ends``, ``right`` of each the true
        ones: float32 [L, T, Hq * D], its outputs."""
        spans = [torch.arange(a, b) for a, b in zip(starts, ends, strict=True)]
        seq_lens = torch.tensor(starts if mode.is_target_verify() else ends)
        batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=len(self.rows),
            req_pool_indices=torch.tensor(self.rows),
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens,
            positions=torch.cat(spans),
            out_cache_loc=torch.cat(
                [self.table[row, span].long() for row, span in zip(self.rows, spans, strict=True)]
            ),
            extend_prefix_lens=torch.tensor(starts),
            extend_prefix_lens_cpu=starts,
            extend_seq_lens_cpu=[len(span) for span in spans],
            spec_info=SimpleNamespace(draft_token_num=self.num_tokens),
        )
        self.backend.batch_indices = self.rows
        self.backend.init_forward_metadata(batch)
        attend = self.backend.forward_decode if mode.is_decode() else self.backend.forward_extend
        outs = []
        for index in range(LAYERS):
            x = torch.cat(
                [
                    torch.cat([t.accepted[index, span[:n]], t.rejected[index, span[n:]]])
                    for t, span, n in zip(self.tokens, spans, right, strict=True)
                ]
            )
            q, k, v = x.split([GROUP * HEADS * DIM, HEADS * DIM, HEADS * DIM], dim=1)
            layer = RadixAttention(GROUP * HEADS, DIM, SCALE, HEADS, layer_id=index)
            outs.append(attend(q, k, v, layer, batch))
        self.backend.end_of_step()
        return torch.stack(outs)

    def prefill(self, lens: list[int]) -> None:
        self._allocate(lens)
        self._run(ForwardMode.EXTEND, self.committed, lens, lens)
        self.committed = lens

    def decode(self) -> torch.Tensor:
        ends = [n + 1 for n in self.committed]
        self._allocate([max(a, b) for a, b in zip(self.allocated, ends, strict=True)])
        out = self._run(ForwardMode.DECODE, self.committed, ends, [1] * len(ends))
        self.committed = ends
        return out

    def verify(self, accepted: list[int]) -> torch.Tensor:
        """Float32 [L, B, N, Hq * D]; ``accepted``: the first draft included."""
        reserve = [n + 2 * self.num_tokens for n in self.committed]
        pages = [-(-n // PAGE_TOKENS) * PAGE_TOKENS for n in reserve]
        self._allocate([max(a, b) for a, b in zip(self.allocated, pages, strict=True)])
        ends = [n + self.num_tokens for n in self.committed]
        out = self._run(ForwardMode.TARGET_VERIFY, self.committed, ends, accepted)
        self.committed = [n + a for n, a in zip(self.committed, accepted, strict=True)]
        return out.unflatten(1, (len(self.rows), self.num_tokens))


def accept_some(num_tokens: int, requests: int, gen: torch.Generator) -> list[int]:
    return torch.randint(1, num_tokens + 1, (requests,), generator=gen).tolist()


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8, 16])
def test_lossless_verification_is_exact(num_tokens: int) -> None:
    """Every accepted token's output is that of attention over the true tokens before it."""
    gen = torch.Generator().manual_seed(num_tokens)
    runner = Runner("lossless", num_tokens, requests=3)
    runner.enter()
    runner.prefill([30, 150, 63])
    for _ in range(25):
        starts, accepted = runner.committed, accept_some(num_tokens, 3, gen)
        out = runner.verify(accepted)
        for layer in range(LAYERS):
            for i, (tokens, start, n) in enumerate(
                zip(runner.tokens, starts, accepted, strict=True)
            ):
                expected = tokens.attention(layer, range(start, start + n))
                assert error_norm(out[layer, i, :n], expected) < 1e-6
        assert runner.allocator.check() == []
    assert runner.store.counters.sealed


@pytest.mark.parametrize("policy", ["uniform", "diffkv"])
def test_pages_are_sealed_as_when_decoding(policy: str) -> None:
    """Same pages, same grades, where everything is accepted but one draft each; same outputs."""
    drafting, decoding = Runner(policy, 3), Runner(policy, 3)
    for runner in (drafting, decoding):
        runner.enter()
        runner.prefill([100])
    for _ in range(150):
        verified, decoded = drafting.verify([2]), [decoding.decode() for _ in range(2)]
        assert drafting.committed == decoding.committed
        assert drafting.allocator.check() == decoding.allocator.check() == []
    sealed = [r.store.directory.sealed.nonzero().flatten() for r in (drafting, decoding)]
    assert len(sealed[0]) == len(sealed[1]) >= 4
    expected = torch.stack(decoded, 2)[:, 0]
    assert error_norm(verified[:, 0, :2], expected) < (1e-3 if policy == "uniform" else 0.1)


def commit(runner: Runner, up_to: int) -> None:
    """As the radix tree takes the first request's pages."""
    tree = SimpleNamespace(
        token_to_kv_pool_allocator=runner.allocator,
        req_to_token_pool=SimpleNamespace(req_to_token=runner.table),
    )
    request: Any = SimpleNamespace(kv=SimpleNamespace(req_pool_idx=runner.rows[0]))
    _commit(tree, request, up_to=up_to)


@pytest.mark.parametrize("quality", [Quality.BALANCED, Quality.LOSSLESS])
def test_what_the_tree_takes_is_counted(quality: Quality) -> None:
    """Its last verification's drafts, too, which no other one follows."""
    runner = Runner("diffxkv", num_tokens=4)
    ledger = runner.store.ledger
    runner.enter(quality)
    runner.prefill([60])
    runner.verify([4])
    assert (ledger.open_tokens, ledger.full_pages) == (61, 0)
    for up_to in (64, 64, 60):  # a stop string in the middle of what was accepted
        commit(runner, up_to)
        assert (ledger.open_tokens, ledger.full_pages) == (64, int(quality is Quality.BALANCED))
        assert runner.allocator.check() == []
    runner.verify([1])
    assert ledger.open_tokens == 65 and runner.allocator.check() == []


def test_mixed_batches_count_what_was_accepted_before() -> None:
    runner = Runner("diffxkv", num_tokens=8, requests=2)
    runner.enter()
    runner.prefill([60, 130])
    runner.verify([7, 2])
    runner.backend.is_mixed = True
    ends = [n + 1 for n in runner.committed]
    runner._run(ForwardMode.EXTEND, runner.committed, ends, [1, 1])
    runner.committed, runner.backend.is_mixed = ends, False
    assert runner.store.ledger.tokens_held == sum(ends) == 68 + 133
    assert runner.allocator.check() == []


def test_rejected_drafts_score_nothing() -> None:
    """Scores and their counts are those of the first query, as if nothing else had been asked."""
    drafting, alone = Runner("diffxkv", 8), Runner("diffxkv", 1)
    for runner in (drafting, alone):
        runner.enter()
        runner.prefill([100])
        for _ in range(6):
            runner.verify([1])
    slots = [
        r.store.directory.raw_slot[r.table[1, :106:64] // PAGE_TOKENS] for r in (drafting, alone)
    ]
    raws = [r.store.raw for r in (drafting, alone)]
    counts = [raw.counts[slot.long()] for raw, slot in zip(raws, slots, strict=True)]
    scores = [raw.scores[:, slot.long()] for raw, slot in zip(raws, slots, strict=True)]
    assert torch.equal(*counts) and bool(counts[0].any())
    assert error_norm(*scores) < 1e-4


def test_a_sealed_page_is_not_written() -> None:
    runner = Runner("uniform", num_tokens=4)
    runner.enter()
    runner.prefill([200])
    runner.verify([1])
    assert runner.store.counters.sealed
    runner.committed = [60]
    with pytest.raises(PageStateError, match="not open"):
        runner.verify([1])
