# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels of extend. Nothing here waits for the device."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels import extend as ops
from sglang_diffxkv.kernels.extend.open_kernel import open_kernel
from sglang_diffxkv.kernels.extend.sealed_kernel import sealed_kernel
from sglang_diffxkv.kernels.extend.traits import (
    MAX_REGISTERS,
    SealedTraits,
    Traits,
    compute_dtype,
    open_tile,
    precision,
    sealed_tile,
)
from sglang_diffxkv.kernels.gpu.device import multiprocessors
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.gpu.views import DTYPES, HeadShape, QueryView, RawView, SealedView
from sglang_diffxkv.kernels.merge import AttentionState, unwritten_state
from sglang_diffxkv.kernels.merge.triton import merge_into
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedPages
from sglang_diffxkv.kernels.softmax import Softmax

SPLIT_PAGES = 16
"""Fewest pages, on average, that are worth a program of their own."""
WARPS_PER_MULTIPROCESSOR = 8
"""What fits with `MAX_REGISTERS`."""


@ops.extend_sealed.register("gpu")
def extend_sealed(queries: Queries, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    """Heads is contiguous, and so are the rows of frames."""
    q, layout = queries.q, sealed.layout
    shape = head_shape(q, layout.num_kv_heads)
    tile = sealed_tile(layout, q.dtype, q.device)
    blocks = count_blocks(queries, shape.group, tile.rows)
    room = WARPS_PER_MULTIPROCESSOR // tile.num_warps * multiprocessors(q.device)
    splits = count_splits(blocks * shape.kv_heads, room, len(sealed.pages))
    merged = unwritten_state(q)
    parts = merged if splits == 1 else unwritten_state(q, splits)
    launch(
        sealed_kernel,
        (blocks, shape.kv_heads, splits),
        queries=QueryView.of(q, softmax, queries.indptr, queries.position),
        sequences=len(queries.indptr) - 1,
        part_rows=merged.lse.numel(),
        lists=sealed.lists,
        sealed=SealedView.of(sealed.tables),
        parts=parts,
        TRAITS=SealedTraits(
            shape, tile, compute_dtype(q.dtype), precision(q.dtype), layout, DTYPES[q.dtype]
        ),
        num_warps=tile.num_warps,
        maxnreg=MAX_REGISTERS,
    )
    if splits > 1:
        merge_into(parts, merged, onto=False)
    return merged


@ops.extend_open.register("gpu")
def extend_open(queries: Queries, opened: OpenPages, softmax: Softmax) -> AttentionState:
    q, dim = queries.q, queries.q.shape[2]
    shape = head_shape(q, opened.keys.shape[2])
    tile = open_tile(dim, q.dtype)
    merged = unwritten_state(q)
    launch(
        open_kernel,
        (count_blocks(queries, shape.group, tile.rows), shape.kv_heads),
        queries=QueryView.of(q, softmax, queries.indptr, queries.position),
        sequences=len(queries.indptr) - 1,
        raw=RawView.of(opened.keys, opened.values),
        lists=opened.lists,
        merged=merged,
        TRAITS=Traits(shape, tile, compute_dtype(q.dtype), precision(q.dtype)),
        num_warps=tile.num_warps,
        maxnreg=MAX_REGISTERS if dim <= 128 else None,
    )
    return merged


def head_shape(q: torch.Tensor, kv_heads: int) -> HeadShape:
    """Of queries [T, Hq, D]."""
    return HeadShape(kv_heads, q.shape[1] // kv_heads, q.shape[2])


def count_splits(programs: int, room: int, pages: int) -> int:
    """How many programs share a sequence's pages, so that few queries, too, fill the GPU.

    Told by shapes alone: the pages of all sequences together stand for those of the longest.

    Args:
        programs: that there are without splits. room: programs that run at a time.
    """
    return max(1, min(room // max(programs, 1), pages // SPLIT_PAGES))


def count_blocks(queries: Queries, group: int, block_m: int) -> int:
    """Blocks of rows, at least as many as all sequences need (`gpu.ragged.first_block`)."""
    return len(queries.q) * group // block_m + len(queries.indptr) - 1
