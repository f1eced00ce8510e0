# SPDX-License-Identifier: Apache-2.0
"""The attention backend: prefills, and what every forward pass notes and seals.

Decode steps differ between devices: `host_backend`, `device_backend`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds

from sglang_diffxkv.attention.batch_pages import BatchPages, gather_pages, note_use, page_table
from sglang_diffxkv.attention.decode_batch import DecodeBatch
from sglang_diffxkv.attention.full_pages import FullPages
from sglang_diffxkv.attention.layer_softmax import softmax_of
from sglang_diffxkv.attention.ready_pages import pages_to_seal
from sglang_diffxkv.attention.scoring import (
    NewTokens,
    ScoringSample,
    count_scores,
    extend_queries,
)
from sglang_diffxkv.attention.window_layers import WindowLayers
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.extend.prefill import Prefill, PrefillBatch
from sglang_diffxkv.kernels.extend.scratch import PrefixScratch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.score import ScoringQueries, score_open
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.pool.committed import Committed, count
from sglang_diffxkv.pool.running import RunningRequests
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStore

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode


class PrefillStep(NamedTuple):
    """What all layers of one prefill share.

    Attributes:
        pages: the batch's pages.
        rows: int64 [T], raw-page rows that the new tokens are written to.
        attention: over all pages of the batch.
        queries: which queries score the open pages; None where the policy needs no scores.
        scored_lens: int64 [B], tokens that have been scored when the step ends.
        nothing_to_seal: whether no sequence has a full page of these.
    """

    pages: BatchPages
    rows: torch.Tensor
    attention: Prefill
    queries: ScoringSample | None
    scored_lens: torch.Tensor
    nothing_to_seal: bool


class Decode(Protocol):
    """Decode steps of one kind of device."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """Write k and v [B * N, H, D] of one layer of the step that runs, N new tokens of each
        sequence, and attend with q [B * N, Hq, D].

        Returns:
            Its output is of q's dtype.
        """


class DiffXKVBackend(AttentionBackend):
    """``--attention-backend diffxkv``; see `host_backend` and `device_backend`.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
        layers: indices in the store, by the model's ids of its layers; None: they are the same.

    Attributes:
        is_mixed: whether this forward pass is a prefill with a token of every running request.
        batch_indices: ``req_pool_index`` of each request of this forward pass, on the host;
            SGLang's warm-up has none.
        forward_metadata: of the prefill that runs. decode_batch: of the decode step that does, or
            the verification. Neither of SGLang's warm-up, which begins steps that it does not end.
        windows: layers that see a window, in models that have some.
        committed: tokens of the batch before and after this forward pass.
        decode: attention of decode steps.
        token_to_kv_pool, req_to_token_pool: SGLang's.
        scratch: where prefills unpack sealed prefixes to, on a GPU.
    """

    decode: Decode
    token_to_kv_pool: Any
    req_to_token_pool: Any
    needs_cpu_seq_lens = True
    is_mixed = False
    batch_indices: list[int] | None = None
    forward_metadata: PrefillStep | None = None
    decode_batch: DecodeBatch | None = None
    committed: Committed
    scratch: PrefixScratch | None = None
    windows: WindowLayers | None = None

    def __init__(
        self,
        store: PageStore,
        req_to_token: torch.Tensor,
        config: DiffXKVConfig,
        running: RunningRequests,
        layers: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers or {index: index for index in range(store.num_layers)}
        self.store, self.req_to_token = store, req_to_token
        self.config, self.running = config, running
        self.full_pages = FullPages(config.window, store.policy.needs_scores)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make `decode`, and `scratch` where prefills need one."""

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Kernels read the directory through the whole forward pass, not only its start."""
        decodes = fm.is_decode() or fm.is_target_verify()
        return SharedReadEnds.POST_REPLAY if decodes else SharedReadEnds.UNKNOWN

    def begin_prefill(self, fb: ForwardBatch) -> None:
        """Look up the batch's pages, note their use, and plan attention for all layers."""
        store, seq_lens = self.store, fb.seq_lens.long()
        longest = int(fb.seq_lens_cpu.max())
        table = page_table(self.req_to_token, fb.req_pool_indices, longest)
        pages = gather_pages(store, table, seq_lens)
        prefix_lens = fb.extend_prefix_lens.long()
        indptr = torch.nn.functional.pad((seq_lens - prefix_lens).cumsum(0), (1, 0))
        new = NewTokens(indptr.to(torch.int32), fb.positions, prefix_lens, fb.extend_seq_lens_cpu)
        queries, policy = None, store.policy
        if policy.needs_scores:
            queries = extend_queries(new, self.config.score_queries, policy.sample)
        store.begin_step(decodes=self.is_mixed)
        note_use(store, pages, seq_lens, self.config.window)
        self._commit(torch.tensor(fb.extend_prefix_lens_cpu), fb.seq_lens_cpu)
        if self.windows is not None:
            self.windows.begin_extend(new, table, seq_lens, fb.out_cache_loc)
        most_scored = longest if queries is None else max(fb.extend_prefix_lens_cpu)
        self.forward_metadata = PrefillStep(
            pages=pages,
            rows=store.write_rows(fb.out_cache_loc),
            attention=self._plan_attention(new, pages, fb.extend_prefix_lens_cpu),
            queries=queries,
            scored_lens=seq_lens if queries is None else prefix_lens,
            nothing_to_seal=most_scored < PAGE_TOKENS,
        )

    def _plan_attention(
        self, new: NewTokens, pages: BatchPages, prefix_lens_cpu: list[int]
    ) -> Prefill:
        batch = PrefillBatch(
            indptr=new.indptr,
            position=new.prefix_lens.to(torch.int32),
            opened=pages.opened,
            last_len=pages.last_len,
            sealed=pages.sealed if pages.any_sealed else None,
            new=new.lens,
            prefix=prefix_lens_cpu,
        )
        return Prefill(batch, self.scratch)

    def begin_decode(self, batch: DecodeBatch) -> None:
        """Count the step's tokens, and note what they asked for whose page is opened for it."""
        self.store.begin_step(decodes=True)
        self.decode_batch = batch
        self._commit(batch.seq_lens_cpu - 1, batch.seq_lens_cpu)

    def _commit(self, starts: torch.Tensor, ends: torch.Tensor) -> None:
        """Count the tokens that this step commits, and note who asked for their pages.

        Args:
            starts: int64 [B] on the host, tokens of each sequence before its first step.
            ends: int64 [B] on the host, committed tokens when this one ends.
        """
        self.committed = Committed(starts, ends)
        if self.batch_indices:
            self.committed = self.running.commit(self.batch_indices, starts, ends)
            count(self.store, self.committed, self.req_to_token)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a (mixed) prefill batch, or a verification: q [T, Hq * D] -> [T, Hq * D]."""
        if forward_batch.forward_mode.is_target_verify():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, sinks)
        step, dim, softmax = self.forward_metadata, layer.qk_head_dim, softmax_of(layer, sinks)
        assert step is not None
        q = q.reshape(-1, layer.tp_q_head_num, dim)
        if save_kv_cache and k is not None:
            k, v = (x.view(-1, layer.tp_k_head_num, dim) for x in (k, v))
        if self.windows is not None and layer.layer_id in self.windows.layers:
            return self.windows.extend(layer.layer_id, q, k, v, softmax).out.to(q.dtype).flatten(1)
        index = self.layers[layer.layer_id]
        if save_kv_cache and k is not None:
            self.store.raw.write(index, step.rows, k, v)
        state = step.attention.attend(q, self.store.layer_pages(index), softmax)
        if step.queries is not None:
            self._score(step, index, q, state.lse, softmax)
        return state.out.to(q.dtype).flatten(1)

    def _score(
        self, step: PrefillStep, layer: int, q: torch.Tensor, lse: torch.Tensor, softmax: Softmax
    ) -> None:
        """Score the open pages with the LSE over all pages."""
        queries, pages, raw = step.queries, step.pages, self.store.raw
        assert queries is not None
        if queries.rows is not None:
            q, lse = q[queries.rows], lse[queries.rows]
        # In units of uniform attention: a query that sees n tokens gives each n * p.
        lse = (lse - queries.log2_seen).contiguous()
        sampled = ScoringQueries(q, lse, queries.indptr, queries.position)
        opened = pages.opened.of(raw.keys[layer], raw.values[layer])
        score_open(sampled, opened, raw.scores[layer], softmax)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of N new tokens per sequence: q [B * N, Hq * D] -> [B * N, Hq * D]."""
        assert save_kv_cache  # models that write it themselves are hooked
        q, k, v = (x.view(len(x), -1, layer.qk_head_dim) for x in (q, k, v))
        softmax = softmax_of(layer, sinks)
        if self.windows is not None and layer.layer_id in self.windows.layers:
            return self.windows.decode(layer.layer_id, q, k, v, softmax).out.flatten(1)
        index = self.layers[layer.layer_id]
        return self.decode.attend(index, q, k, v, softmax).out.flatten(1)

    def end_of_step(self) -> None:
        """After all layers: count the scores, and seal what is full, scored and not recent."""
        step, batch = self.forward_metadata, self.decode_batch
        self.forward_metadata = self.decode_batch = None
        if batch is not None:
            if due := self.full_pages.due(*self.committed[:2]):
                self.seal_decoded(batch, due)
            return
        self.full_pages.expect_any()
        if step is None:
            return
        if step.queries is not None:
            count_scores(self.store, step.pages, step.queries)
        if not step.nothing_to_seal:
            seal(self.store, *pages_to_seal(self.store, step.pages, step.scored_lens))

    def seal_decoded(self, batch: DecodeBatch, due: float) -> None:
        """Seal what a decode step leaves full, scored and not recent, about ``due`` pages.

        After a prefill that may be any number of pages, and many of one sequence, which are judged
        together: to list them is to wait for the device, as prefills do.
        """
        pages = gather_pages(self.store, self.pages_of(batch), batch.seq_lens)
        seal(self.store, *pages_to_seal(self.store, pages, self.scored_lens(batch)))

    def pages_of(self, batch: DecodeBatch) -> torch.Tensor:
        """`page_table` of a decode step's sequences."""
        longest = int(batch.seq_lens_cpu.max())
        return page_table(self.req_to_token, batch.req_pool_indices, longest)

    def scored_lens(self, batch: DecodeBatch) -> torch.Tensor:
        """Int64 [B]: tokens of each sequence that have been scored, if they need be."""
        return batch.seq_lens - 1 if self.store.policy.needs_scores else batch.seq_lens


def find_backend(backend: Any) -> DiffXKVBackend | None:
    """Ours: ``backend`` itself, or that of full attention in a hybrid one of SGLang's."""
    found = getattr(backend, "full_attn_backend", backend)
    return found if isinstance(found, DiffXKVBackend) else None
