# SPDX-License-Identifier: Apache-2.0
"""Decode attention on the GPU: one launch over all pages, open and sealed, and one that merges."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import decode as ops
from sglang_diffxkv.kernels.decode.attend import DecodeQueries, attend_work_tile
from sglang_diffxkv.kernels.decode.constants import DecodeTraits, attend_constants, block_of_rows
from sglang_diffxkv.kernels.decode.work import SequencePages, WorkTiles, divide_open, divide_work
from sglang_diffxkv.kernels.gpu.launch import is_interpreted, launch
from sglang_diffxkv.kernels.gpu.views import DTYPES, QueryView, RawView, SealedView
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, unwritten_state
from sglang_diffxkv.kernels.merge.triton import merge_tiles
from sglang_diffxkv.kernels.pages import LayerPages, OpenPages, SealedPages
from sglang_diffxkv.kernels.softmax import Softmax


def attend(
    q: torch.Tensor,
    q_sealed: torch.Tensor,
    pages: LayerPages,
    work: WorkTiles,
    softmax: Softmax,
    dtype: torch.dtype = torch.float32,
) -> AttentionState:
    """Attention of every sequence's newest tokens over all its pages, of one layer.

    Each of N new tokens sees those before it: all sealed pages, which none of them is in, and of
    open pages the tokens up to itself, no further back than the layer's window. A page's place in
    the list of its sequence stands for its position: with a window, or where N > 1, open pages
    follow each other up to the one of the last new token. No host sync, and no shape that depends
    on data: fit for a CUDA graph.

    Args:
        q, q_sealed: [B * N, Hq, D], sequence by sequence, as open and as sealed keys want them
            (`PageLayout.rotates`); tokens may be strided, what belongs to one is contiguous.
        pages: no page is sealed where the arena has no frames. Without a key mean, what is found
            in sealed pages is left in their basis. With a soft cap, which is not linear, the mean
            is zero or None: sealed keys must lack nothing.
        work: this layer's, from `divide_work`.
        softmax: with its sinks.
        dtype: of the output, to which it is rounded at the end.
    """
    layout, raw = pages.tables.layout, RawView.of(pages.keys, pages.values)
    group, dim = q.shape[1] // layout.num_kv_heads, q.shape[2]
    rows = group * (len(q) // len(work.sequences.count))
    in_fp32 = raw.k.itemsize != 2 or (is_interpreted() and raw.k.dtype == torch.bfloat16)
    dim_block = triton.next_power_of_2(dim)
    plain = rows == group and not softmax.cap and softmax.window_left < 0
    constants = attend_constants(block_of_rows(rows, dim_block), dim_block, plain=plain)
    traits = DecodeTraits(layout, group, rows // group, DTYPES[raw.k.dtype], in_fp32, constants)
    tiles = len(work.tiles)
    parts = AttentionState(
        q.new_empty(tiles, rows, dim, dtype=torch.float32),
        q.new_empty(tiles, rows, dtype=torch.float32),
    )
    queries = DecodeQueries(QueryView.of(q, softmax), QueryView.of(q_sealed, softmax))
    launch(
        attend_work_tile,
        (tiles * traits.blocks,),
        work=work,
        segments=len(work.segment_start) - 1,
        queries=queries,
        raw=raw,
        sealed=SealedView.of(pages.tables) if len(pages.tables.arena) else None,
        parts=parts,
        TRAITS=traits,
        num_warps=constants.num_warps,
        maxnreg=constants.registers,
    )
    merged = unwritten_state(q, dtype=dtype)
    merge_tiles(
        parts,
        work.segment_start,
        queries.open,
        pages.key_mean,
        softmax.sinks,
        merged,
        layout.num_kv_heads,
    )
    return merged


@ops.decode_sealed.register("gpu")
def decode_sealed(q: torch.Tensor, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    count, layout = sealed.indptr.diff(), sealed.layout
    sequences = SequencePages(sealed.pages, sealed.indptr, count, None, count)
    work = divide_work(sequences, sealed.heads[None], layout).layer(0)
    raw = q.new_empty(0, PAGE_TOKENS, layout.num_kv_heads, layout.head_dim)
    return attend(q, q, LayerPages(sealed.tables, raw, raw, None), work, softmax.of_part)


@ops.decode_open.register("gpu")
def decode_open(
    q: torch.Tensor, opened: OpenPages, last_len: torch.Tensor, softmax: Softmax
) -> AttentionState:
    indptr = opened.indptr
    slots = torch.arange(len(opened.keys), dtype=torch.int32, device=q.device)
    sequences = SequencePages(opened.slots, indptr, indptr.diff(), slots, last_len)
    pages = LayerPages.of_open(opened.keys, opened.values)
    work = divide_open(sequences, pages.tables.layout)
    return attend(q, q, pages, work, softmax.of_part)
