# SPDX-License-Identifier: Apache-2.0
"""Decode attention on the GPU: one launch over all pages, open and sealed, and one that merges."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import decode as ops
from sglang_diffxkv.kernels.decode.attend import DecodeQueries, attend_work_tile
from sglang_diffxkv.kernels.decode.constants import DecodeTraits, attend_constants, padded_group
from sglang_diffxkv.kernels.decode.work import SequencePages, WorkTiles, divide_work
from sglang_diffxkv.kernels.gpu.launch import is_interpreted, launch
from sglang_diffxkv.kernels.gpu.views import DTYPES, QueryView, RawView, SealedView
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, make_layout
from sglang_diffxkv.kernels.merge import AttentionState, unwritten_state
from sglang_diffxkv.kernels.merge.triton import merge_tiles
from sglang_diffxkv.kernels.pages import LayerPages, OpenPages, SealedPages, SealedTables
from sglang_diffxkv.kernels.softmax import Softmax


def attend(
    q: torch.Tensor,
    q_sealed: torch.Tensor,
    pages: LayerPages,
    work: WorkTiles,
    softmax: Softmax,
    dtype: torch.dtype = torch.float32,
) -> AttentionState:
    """Attention of every sequence's query over all its pages, of one layer.

    No host sync, and no shape that depends on data: fit for a CUDA graph.

    Args:
        q, q_sealed: [B, Hq, D], as open and as sealed keys want them (`PageLayout.rotates`);
            sequences may be strided, what belongs to one is contiguous.
        pages: no page is sealed where the arena has no frames. Without a key mean, what is found
            in sealed pages is left in their basis.
        work: this layer's, from `divide_work`.
        dtype: of the output, to which it is rounded at the end.
    """
    layout, raw = pages.tables.layout, RawView.of(pages.keys, pages.values)
    group, dim = q.shape[1] // layout.num_kv_heads, q.shape[2]
    in_fp32 = raw.k.itemsize != 2 or (is_interpreted() and raw.k.dtype == torch.bfloat16)
    constants = attend_constants(padded_group(group), triton.next_power_of_2(dim))
    traits = DecodeTraits(layout, group, DTYPES[raw.k.dtype], in_fp32, constants)
    tiles, scale = len(work.tiles), softmax.log2_scale
    parts = AttentionState(
        q.new_empty(tiles, group, dim, dtype=torch.float32),
        q.new_empty(tiles, group, dtype=torch.float32),
    )
    launch(
        attend_work_tile,
        (tiles,),
        work=work,
        segments=len(work.segment_start) - 1,
        queries=DecodeQueries(q, q_sealed, q.stride(0), q_sealed.stride(0), scale),
        raw=raw,
        sealed=SealedView.of(pages.tables) if len(pages.tables.arena) else None,
        parts=parts,
        TRAITS=traits,
        num_warps=constants.num_warps,
        maxnreg=constants.registers,
    )
    merged = unwritten_state(q, dtype=dtype)
    queries = QueryView(q, q.stride(0), scale)
    merge_tiles(parts, work.segment_start, queries, pages.key_mean, merged)
    return merged


@ops.decode_sealed.register("gpu")
def decode_sealed(q: torch.Tensor, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    count, layout = sealed.indptr.diff(), sealed.layout
    sequences = SequencePages(sealed.pages, sealed.indptr, count, None, count)
    work = divide_work(sequences, sealed.heads[None], layout).layer(0)
    raw = q.new_empty(0, PAGE_TOKENS, layout.num_kv_heads, layout.head_dim)
    return attend(q, q, LayerPages(sealed.tables, raw, raw, None), work, softmax)


@ops.decode_open.register("gpu")
def decode_open(
    q: torch.Tensor, opened: OpenPages, last_len: torch.Tensor, softmax: Softmax
) -> AttentionState:
    keys, indptr = opened.keys, opened.indptr
    count, _, kv_heads, dim = keys.shape
    raw = FORMATS["raw"]
    layout = make_layout(
        head_dim=dim, num_kv_heads=kv_heads, raw_itemsize=keys.itemsize, high=raw, low=raw
    )
    slots = torch.arange(count, dtype=torch.int32, device=q.device)
    sequences = SequencePages(opened.slots, indptr, indptr.diff(), slots, last_len)
    heads = slots.new_zeros(1, count, kv_heads, 2)
    work = divide_work(sequences, heads, layout).layer(0)
    arena = q.new_empty(0, layout.frame_bytes, dtype=torch.uint8)
    tables = SealedTables(arena, heads[0, :, 0], heads[0], layout)
    return attend(q, q, LayerPages(tables, keys, opened.values, None), work, softmax)
