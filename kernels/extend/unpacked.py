# SPDX-License-Identifier: Apache-2.0
"""Many queries over sealed pages on a GPU: unpack them once, then dense attention over their rows.

Heads keep different numbers of tokens. Their rows are unpacked side by side, so pruned tokens cost
nothing, and where a sequence's rows begin and end is counted on the device: nothing here waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_diffxkv.kernels.extend.scratch import PrefixScratch, UnpackedPages
from sglang_diffxkv.kernels.extend.traits import (
    MAX_REGISTERS,
    UnpackedTraits,
    precision,
    unpacked_tile,
)
from sglang_diffxkv.kernels.extend.triton import count_blocks, count_splits, head_shape
from sglang_diffxkv.kernels.extend.unpacked_kernels import starts_kernel, unpacked_kernel
from sglang_diffxkv.kernels.gpu.device import multiprocessors
from sglang_diffxkv.kernels.gpu.launch import is_interpreted, launch
from sglang_diffxkv.kernels.gpu.views import DTYPES, QueryView
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, unwritten_state
from sglang_diffxkv.kernels.merge.triton import merge_into
from sglang_diffxkv.kernels.pack import TokenRows
from sglang_diffxkv.kernels.pack.triton import unpack_into
from sglang_diffxkv.kernels.pages import Queries, SealedPages, SealedTables
from sglang_diffxkv.kernels.softmax import Softmax


def extend_unpacked(
    state: AttentionState,
    queries: Queries,
    sealed: SealedPages,
    softmax: Softmax,
    scratch: PrefixScratch,
) -> None:
    """Add to a state what `extend_sealed` computes; queries are rounded to the scratch's dtype.

    Args:
        state: contiguous, attention of the same queries over other tokens; written.
        sealed: pages after ``indptr[-1]`` are unpacked, but nobody's, and must be of no more tokens
            than a page has.
        scratch: of the same layout.
    """
    slices = scratch.slices(sealed.lists)
    extend_slices(state, queries, sealed.tables, slices, softmax, scratch)


def extend_slices(
    state: AttentionState,
    queries: Queries,
    tables: SealedTables,
    slices: Sequence[UnpackedPages],
    softmax: Softmax,
    scratch: PrefixScratch,
) -> None:
    """`extend_unpacked`, of `PrefixScratch.slices`, which are those of all layers."""
    for listed in slices:
        count = len(listed.pages)
        starts = scratch.starts[: count + 1]
        count_rows(tables.heads, listed.pages, starts, scratch.pages * PAGE_TOKENS)
        rows = TokenRows(scratch.k, scratch.v, starts[:-1])
        unpack_into(tables, listed.pages, rows, scratch.k.dtype)
        _attend(state, queries, listed, softmax, scratch)


def count_rows(
    heads: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor, capacity: int
) -> None:
    """`naive.row_starts`, into ``starts``."""
    h = heads.shape[1]
    launch(
        starts_kernel,
        (h,),
        heads=heads,
        heads_stride=heads.stride(0),
        pages=pages,
        count=len(pages),
        starts=starts,
        capacity=capacity,
        HEADS=h,
        num_warps=4,
    )


def _attend(
    state: AttentionState,
    queries: Queries,
    listed: UnpackedPages,
    softmax: Softmax,
    scratch: PrefixScratch,
) -> None:
    """Add what the unpacked pages give."""
    assert state.out.is_contiguous() and state.lse.is_contiguous()
    q, dtype = queries.q, scratch.k.dtype
    shape = head_shape(q, scratch.starts.shape[1])
    emulated = dtype == torch.bfloat16 and is_interpreted()  # which multiplies no bf16
    tile = unpacked_tile(shape.dim, dtype, q.device)
    blocks = count_blocks(queries, shape.group, tile.rows)
    # A slice has tokens of some of the sequences only.
    busy = -(-blocks * shape.kv_heads // listed.slices)
    splits = count_splits(busy, multiprocessors(q.device), len(listed.pages))
    compute = DTYPES[torch.float32 if emulated else dtype]
    into = state if splits == 1 else unwritten_state(q, splits)
    launch(
        unpacked_kernel,
        (blocks, shape.kv_heads, splits),
        queries=QueryView.of(q, softmax, queries.indptr, queries.position),
        sequences=len(queries.indptr) - 1,
        part_rows=state.lse.numel(),
        indptr=listed.indptr,
        scratch=scratch,
        merged=into,
        TRAITS=UnpackedTraits(shape, tile, compute, precision(dtype), split=splits > 1),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=MAX_REGISTERS,
    )
    if splits > 1:
        merge_into(into, state, onto=True)
