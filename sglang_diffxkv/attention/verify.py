# SPDX-License-Identifier: Apache-2.0
"""Verification of drafts: N queries of each sequence, a chain behind its committed tokens.

The first query is that of the token that was sampled last, so it is always accepted. It alone
scores open tokens, as the query of a decode step does: what others may look at, a rejected draft
must not decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_diffxkv.attention.backend import DecodeBatch, DiffXKVBackend, PrefillStep
from sglang_diffxkv.attention.batch_pages import gather_pages, note_use, page_table
from sglang_diffxkv.attention.scoring import NewTokens, ScoringSample

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def begin_verify(backend: DiffXKVBackend, fb: ForwardBatch) -> None:
    """Look up the batch's pages, note their use, and plan attention for all layers.

    Args:
        fb: its ``seq_lens`` are the committed tokens, which ``spec_info.draft_token_num`` follow
            of each sequence.
    """
    store, committed, num_tokens = backend.store, fb.seq_lens.long(), fb.spec_info.draft_token_num
    batch = DecodeBatch(fb.req_pool_indices.long(), committed + 1, fb.seq_lens_cpu.long() + 1)
    backend.begin_decode(batch)
    longest = int(fb.seq_lens_cpu.max()) + num_tokens
    table = page_table(backend.req_to_token, batch.req_pool_indices, longest)
    pages = gather_pages(store, table, committed + num_tokens)
    note_use(store, pages, batch.seq_lens, backend.config.window)
    each = torch.arange(len(committed) + 1, dtype=torch.int32, device=committed.device)
    indptr, queries = each * num_tokens, None
    if store.policy.needs_scores:
        queries = ScoringSample.at(indptr[:-1].long(), each, committed)
    new = NewTokens(indptr, fb.positions, committed, [num_tokens] * len(committed))
    backend.forward_metadata = PrefillStep(
        pages=pages,
        rows=store.write_rows(fb.out_cache_loc.long()),
        attention=backend.plan_attention(new, pages, fb.seq_lens_cpu.tolist()),
        queries=queries,
        scored_lens=backend.scored_lens(batch),
        nothing_to_seal=True,
    )
