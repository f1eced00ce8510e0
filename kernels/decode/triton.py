# SPDX-License-Identifier: Apache-2.0
"""Decode attention on the GPU: one launch over all pages, open and sealed, and one that merges."""

from __future__ import annotations

import math

import torch
import triton

from sglang_diffxkv.kernels.decode.attend import attend_item
from sglang_diffxkv.kernels.decode.constants import attend_constants
from sglang_diffxkv.kernels.decode.plan import DecodePlan, SequencePages, plan_decode
from sglang_diffxkv.kernels.gpu.launch import is_interpreted, launch
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, PageLayout, make_layout
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.merge.triton_kernels import merge_items

LOG2_E = math.log2(math.e)
BYTE_MASK = 0x00FF00FF
_PAGES = 32
_MERGE_PARTS = 4096
"""Elements of items that are merged at a time, so that they stay in registers."""


def attend(
    q: torch.Tensor,
    q_sealed: torch.Tensor,
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    plan: DecodePlan,
    layout: PageLayout,
    sm_scale: float,
    *,
    has_sealed: bool = True,
    key_mean: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> AttentionState:
    """Attention of every sequence's query over all its pages, of one layer.

    No host sync, and no shape that depends on data: fit for a CUDA graph.

    Args:
        q, q_sealed: [B, Hq, D], as open and as sealed keys want them (`PageLayout.rotates`);
            sequences may be strided, what belongs to one is contiguous.
        arena, frames, heads: as `decode.decode_sealed` takes them.
        k_raw, v_raw: as `decode.decode_open` takes them.
        plan: this layer's, from `plan_decode`.
        has_sealed: whether any page may be sealed; the arena is not read if not.
        key_mean: fp32 [H, D], contiguous, which sealed keys lack: what is found in sealed pages is
            brought back from their basis (`sealed_basis`). None: it is left in that.
        dtype: of the output, to which it is rounded at the end.
    """
    batch, q_heads, dim = q.shape
    kv_heads = layout.num_kv_heads
    group = q_heads // kv_heads
    items = len(plan.items)
    blocks = {
        "GROUP": group,
        "GROUP_BLOCK": max(8, triton.next_power_of_2(group)),
        "DIM": dim,
        "DIM_BLOCK": triton.next_power_of_2(dim),
    }
    constants = attend_constants(blocks["GROUP_BLOCK"], blocks["DIM_BLOCK"])
    parts = q.new_empty(items, group, dim, dtype=torch.float32)
    part_lse = q.new_empty(items, group, dtype=torch.float32)
    sequences = plan.sequences
    high, low = layout.high, layout.low
    in_16_bits = k_raw.itemsize == 2 and not (is_interpreted() and k_raw.dtype == torch.bfloat16)
    launch(
        attend_item,
        (items,),
        items=plan.items,
        row_start=plan.row_start,
        rows=len(plan.row_start) - 1,
        q=q,
        q_sealed=q_sealed,
        arena=arena,
        frames=frames,
        heads=heads,
        keys=k_raw,
        values=v_raw,
        first_page=sequences.first,
        num_pages=sequences.count,
        pages=sequences.pages,
        raw_slot=sequences.pages if sequences.raw_slot is None else sequences.raw_slot,
        last_len=sequences.last_len,
        out=parts,
        lse=part_lse,
        score_scale=sm_scale * LOG2_E,
        q_stride=q.stride(0),
        q_sealed_stride=q_sealed.stride(0),
        frames_stride=frames.stride(0),
        heads_stride=heads.stride(0),
        raw_stride=k_raw.stride(0),
        byte_mask=BYTE_MASK,
        KV_HEADS=kv_heads,
        KEY_HIGH=high.key_bits,
        VALUE_HIGH=high.value_bits,
        KEY_LOW=low.key_bits,
        VALUE_LOW=low.value_bits,
        FRAME_BYTES=layout.frame_bytes,
        BLOCK_N=constants.tokens,
        PAGES=_PAGES,
        STAGES=constants.num_stages,
        IN_FP32=not in_16_bits,
        HAS_OPEN=sequences.raw_slot is not None,
        HAS_SEALED=has_sealed,
        num_warps=constants.num_warps,
        maxnreg=constants.registers,
        **blocks,
    )
    part = AttentionState(
        torch.empty(q.shape, dtype=dtype, device=q.device),
        torch.empty(q.shape[:2], dtype=torch.float32, device=q.device),
    )
    launch(
        merge_items,
        (batch * q_heads,),
        parts=parts,
        part_lse=part_lse,
        row_start=plan.row_start,
        q=q,
        key_mean=part.lse if key_mean is None else key_mean,
        out=part.out,
        lse=part.lse,
        score_scale=sm_scale * LOG2_E,
        q_stride=q.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        DIM_BLOCK=blocks["DIM_BLOCK"],
        PARTS=_MERGE_PARTS // blocks["DIM_BLOCK"],
        TURNS=key_mean is not None,
        SIZE=dim & -dim,
        SCALE=(dim & -dim) ** -0.5,
        num_warps=4,
    )
    return part


def decode_sealed(
    q: torch.Tensor,
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    indptr: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    sm_scale: float,
) -> AttentionState:
    """See :func:`sglang_diffxkv.kernels.decode.decode_sealed`."""
    count = indptr.diff()
    sequences = SequencePages(pages, indptr, count, None, count)
    plan = plan_decode(sequences, heads[None], layout).layer(0)
    raw = q.new_empty(0, PAGE_TOKENS, layout.num_kv_heads, layout.head_dim)
    return attend(q, q, arena, frames, heads, raw, raw, plan, layout, sm_scale)


def decode_open(
    q: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
    last_len: torch.Tensor,
    sm_scale: float,
) -> AttentionState:
    """See :func:`sglang_diffxkv.kernels.decode.decode_open`."""
    slot_count, _, kv_heads, dim = k_raw.shape
    layout = make_layout(
        head_dim=dim,
        num_kv_heads=kv_heads,
        raw_itemsize=k_raw.itemsize,
        high=FORMATS["raw"],
        low=FORMATS["raw"],
    )
    every_slot = torch.arange(slot_count, dtype=torch.int32, device=q.device)
    sequences = SequencePages(slots, indptr, indptr.diff(), every_slot, last_len)
    heads = every_slot.new_zeros(1, slot_count, kv_heads, 2)
    plan = plan_decode(sequences, heads, layout).layer(0)
    arena = q.new_empty(1, layout.frame_bytes, dtype=torch.uint8)
    sealed = (arena, heads[0, :, 0], heads[0])
    return attend(q, q, *sealed, k_raw, v_raw, plan, layout, sm_scale, has_sealed=False)
