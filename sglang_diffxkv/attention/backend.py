# SPDX-License-Identifier: Apache-2.0
"""The attention backend: attention over open pages, over sealed pages, and their merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds

from sglang_diffxkv.attention.metadata import (
    BatchPages,
    ScoringQueries,
    count_scores,
    decode_queries,
    extend_queries,
    gather_pages,
    note_quality,
    note_use,
    pages_to_seal,
)
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.decode import decode_open, decode_sealed
from sglang_diffxkv.kernels.extend import (
    OpenList,
    PageList,
    Prefill,
    PrefixScratch,
    SealedTables,
    make_scratch,
)
from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, merge_states
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.score import SampledQueries, score_open
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.kv_pool import DiffXKVPool
from sglang_diffxkv.pool.request_rows import RequestRows
from sglang_diffxkv.pool.store import NotedQuality

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner


class StepMetadata(NamedTuple):
    """What all layers of one forward pass share.

    Attributes:
        pages: the batch's pages.
        rows: int64 [T], raw-page rows that the new tokens are written to.
        queries: which queries score the open pages; None where the policy needs no scores.
        seq_lens, prefix_lens: int64 [B], with and without this step's tokens.
        q_indptr: int32 [B + 1], new tokens of each sequence.
        prefill: attention of a prefill; None in a decode step.
        nothing_to_seal: whether no sequence has a full page that has been scored.
    """

    pages: BatchPages
    rows: torch.Tensor
    queries: ScoringQueries | None
    seq_lens: torch.Tensor
    prefix_lens: torch.Tensor
    q_indptr: torch.Tensor
    prefill: Prefill | None
    nothing_to_seal: bool


class DiffXKVBackend(AttentionBackend):
    """``--attention-backend diffxkv``."""

    needs_cpu_seq_lens = True
    is_mixed = False
    """Whether this forward pass is a prefill with a token of every running request."""
    batch_rows: list[int] | None = None
    """Rows of this forward pass's requests, on the host; SGLang's warm-up has none."""
    scratch: PrefixScratch | None = None
    """Where prefills unpack sealed prefixes to, on a GPU."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        pool, allocator = model_runner.token_to_kv_pool, model_runner.token_to_kv_pool_allocator
        if not isinstance(pool, DiffXKVPool) or not isinstance(allocator, DiffXKVAllocator):
            raise RuntimeError(
                "diffxkv: SGLang did not build the diffxkv pool, so a hook failed to apply; see "
                "the plugin errors above in the log"
            )
        self.token_to_kv_pool = pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.store = pool.store
        table = self.req_to_token_pool.req_to_token
        self.rows = RequestRows(table.shape[0], table.device)
        self.config = pool.setup.config
        self.forward_metadata: StepMetadata | None = None
        if on_gpu(table):
            self.scratch = make_scratch(self.store.layout, pool.dtype, table.device)

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Kernels read the directory through the whole forward pass, not only its start."""
        return SharedReadEnds.POST_REPLAY if fm.is_decode() else SharedReadEnds.UNKNOWN

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        fb, store = forward_batch, self.store
        seq_lens = fb.seq_lens.long()
        is_decode = fb.forward_mode.is_decode()
        longest = int(fb.seq_lens_cpu.max())
        pages = gather_pages(
            store, self.req_to_token_pool.req_to_token, fb.req_pool_indices, seq_lens, longest
        )
        prefix_lens = seq_lens - 1 if is_decode else fb.extend_prefix_lens.long()
        lens = (seq_lens - prefix_lens).cumsum(0)
        q_indptr = torch.nn.functional.pad(lens, (1, 0)).to(torch.int32)
        queries = None
        policy = store.policy
        if policy.needs_scores and is_decode:
            queries = decode_queries(seq_lens)
        elif policy.needs_scores:
            queries = extend_queries(
                fb.positions,
                q_indptr,
                prefix_lens,
                fb.extend_seq_lens_cpu,
                self.config.score_queries,
                policy.sample,
            )
        scored = longest
        if policy.needs_scores:
            scored = longest - 1 if is_decode else max(fb.extend_prefix_lens_cpu)
        store.begin_step(decodes=is_decode or self.is_mixed)
        note_use(store, pages, seq_lens, self.config.window)
        starts = fb.seq_lens_cpu - 1 if is_decode else torch.tensor(fb.extend_prefix_lens_cpu)
        noted = self._count_tokens(starts, fb.seq_lens_cpu)
        if noted is not None:
            quality = self.rows.quality[fb.req_pool_indices]
            note_quality(store, pages, prefix_lens, quality, noted)
        prefill = None
        if not is_decode:
            starts = prefix_lens.to(torch.int32)
            prefill = Prefill(
                q_indptr,
                OpenList(starts, pages.open_indptr, pages.slots, pages.position),
                pages.last_len,
                PageList(pages.sealed_indptr, pages.sealed) if pages.any_sealed else None,
                fb.extend_seq_lens_cpu,
                fb.extend_prefix_lens_cpu,
                self.scratch,
            )
        self.forward_metadata = StepMetadata(
            pages=pages,
            rows=store.write_rows(fb.out_cache_loc),
            queries=queries,
            seq_lens=seq_lens,
            prefix_lens=prefix_lens,
            q_indptr=q_indptr,
            prefill=prefill,
            nothing_to_seal=scored < PAGE_TOKENS,
        )

    def _count_tokens(self, starts: torch.Tensor, ends: torch.Tensor) -> NotedQuality | None:
        """Tell the ledger what this step writes.

        Args:
            starts, ends: int64 [B] on the host, tokens of each sequence before and after it.

        Returns:
            The pages opened for it by what was asked for; None where nobody asks for anything.
        """
        if not self.batch_rows:
            return None
        full = ends // PAGE_TOKENS - starts // PAGE_TOKENS
        self.store.ledger.write(int((ends - starts).sum()), full=int(full.sum()))
        if not self.rows.asked:
            return None
        return self.rows.note_quality(self.batch_rows, starts.tolist(), ends.tolist())

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of a (mixed) prefill batch: q [T, Hq * D] -> [T, Hq * D]."""
        step, index, q = self._begin(q, k, v, layer, save_kv_cache)
        assert step.prefill is not None
        store, raw = self.store, self.store.raw
        tables = SealedTables(
            store.arena.buffer,
            store.directory.frames[index],
            store.directory.heads[index],
            store.layout,
        )
        mean = store.key_means.by_layer[index]
        part = step.prefill.run(q, raw.keys[index], raw.values[index], tables, mean, layer.scaling)
        return self._finish(q, part, step, index, layer)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of one new token per sequence: q [B, Hq * D] -> [B, Hq * D]."""
        step, index, q = self._begin(q, k, v, layer, save_kv_cache)
        pages = step.pages
        part = decode_open(
            q,
            self.store.raw.keys[index],
            self.store.raw.values[index],
            pages.open_indptr,
            pages.slots,
            pages.last_len,
            layer.scaling,
        )
        if pages.any_sealed:
            part = merge_states(part, self._decode_sealed(index, q, pages, layer.scaling))
        return self._finish(q, part, step, index, layer)

    def _begin(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        save_kv_cache: bool,
    ) -> tuple[StepMetadata, int, torch.Tensor]:
        step = self.forward_metadata
        assert step is not None
        heads, dim = layer.tp_k_head_num, layer.qk_head_dim
        if save_kv_cache and k is not None:
            k, v = k.view(-1, heads, dim), v.view(-1, heads, dim)
            self.token_to_kv_pool.write(layer.layer_id, step.rows, k, v)
        index = layer.layer_id - self.token_to_kv_pool.start_layer
        return step, index, q.reshape(-1, layer.tp_q_head_num, dim)

    def _decode_sealed(
        self, index: int, q: torch.Tensor, pages: BatchPages, sm_scale: float
    ) -> AttentionState:
        """Attention of q [B, Hq, D] over the batch's sealed pages of one layer."""
        store, d = self.store, self.store.directory
        lists = pages.sealed_indptr, pages.sealed
        sealed = store.arena.buffer, d.frames[index], d.heads[index], *lists, store.layout
        if not store.layout.rotates:
            return decode_sealed(q, *sealed, sm_scale)
        part = decode_sealed(rotate(q.float()), *sealed, sm_scale)
        return from_sealed(part, q, store.key_means.by_layer[index], sm_scale)

    def _finish(
        self,
        q: torch.Tensor,
        part: AttentionState,
        step: StepMetadata,
        index: int,
        layer: RadixAttention,
    ) -> torch.Tensor:
        """Score the open pages with the full LSE, and shape the output as SGLang wants it."""
        if step.queries is not None:
            rows = step.queries.rows
            lse = part.lse if rows is None else part.lse[rows]
            sampled, raw, pages = step.queries, self.store.raw, step.pages
            score_open(
                SampledQueries(
                    q if rows is None else q[rows], sampled.indptr, sampled.position
                ),
                # scores in units of uniform attention: a query that sees n tokens gives each n * p
                (lse - sampled.log2_seen).contiguous(),
                OpenPages(
                    raw.keys[index], raw.values[index], pages.open_indptr, pages.slots,
                    pages.position,
                ),
                raw.scores[index],
                layer.scaling,
            )  # fmt: skip
        return part.out.to(q.dtype).flatten(1)

    def end_of_step(self) -> None:
        """After all layers: count the scores, and seal what is full, scored and not recent."""
        step, self.forward_metadata = self.forward_metadata, None
        if step is None:
            return
        scored_lens = step.seq_lens
        if step.queries is not None:
            count_scores(self.store, step.pages, step.queries)
            scored_lens = step.prefix_lens
        if step.nothing_to_seal:
            return
        self.store.seal(*pages_to_seal(self.store, step.pages, scored_lens))
