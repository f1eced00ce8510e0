# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels that merge attention states. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import merge as ops
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.gpu.views import HeadShape, QueryView
from sglang_diffxkv.kernels.merge import AttentionState, unwritten_state
from sglang_diffxkv.kernels.merge.kernels import merge_splits, merge_two
from sglang_diffxkv.kernels.merge.sink_kernels import sink_rows
from sglang_diffxkv.kernels.merge.tile_kernels import merge_work_tiles

MERGE_ROWS = 16


@ops.merge_states.register("gpu")
def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """One pass over each of the two."""
    rows, dim = a.lse.numel(), a.out.shape[-1]
    merged = unwritten_state(a.out)
    launch(
        merge_two,
        (triton.cdiv(rows, MERGE_ROWS),),
        a=_contiguous(a),
        b=_contiguous(b),
        merged=merged,
        rows=rows,
        DIM=dim,
        ROWS=MERGE_ROWS,
        num_warps=4,
    )
    return merged


@ops.add_sinks.register("gpu")
def add_sinks(state: AttentionState, sinks: torch.Tensor) -> AttentionState:
    """In place."""
    rows, (heads, dim) = state.lse.numel(), state.out.shape[-2:]
    launch(
        sink_rows,
        (triton.cdiv(rows, MERGE_ROWS),),
        state=state,
        sinks=sinks,
        rows=rows,
        HEADS=heads,
        DIM=dim,
        ROWS=MERGE_ROWS,
        num_warps=4,
    )
    return state


def _contiguous(state: AttentionState) -> AttentionState:
    return AttentionState(state.out.contiguous(), state.lse.contiguous())


def merge_into(splits: AttentionState, merged: AttentionState, *, onto: bool) -> None:
    """Merge the states of the same queries over several parts of the tokens into one.

    Args:
        splits: [splits, T, Hq, D] and [splits, T, Hq].
        merged: [T, Hq, D] and [T, Hq], written.
        onto: whether it holds attention over further tokens.
    """
    rows = merged.lse.numel()
    launch(
        merge_splits,
        (triton.cdiv(rows, MERGE_ROWS),),
        parts=splits,
        splits=len(splits.lse),
        rows=rows,
        merged=merged,
        ONTO=onto,
        DIM=merged.out.shape[2],
        ROWS=MERGE_ROWS,
        num_warps=4,
    )


def merge_tiles(
    parts: AttentionState,
    segment_start: torch.Tensor,
    queries: QueryView,
    key_mean: torch.Tensor | None,
    sinks: torch.Tensor | None,
    merged: AttentionState,
    kv_heads: int,
) -> None:
    """Merge the work tiles of a decode step of N new tokens per sequence.

    Args:
        parts: fp32 [tiles, N * group, D] and [tiles, N * group].
        segment_start: int32 [B * H * 3 + 1], first tile of each segment (`decode.work`).
        queries: [B * N, Hq, D], not rotated.
        key_mean: fp32 [H, D], contiguous, which sealed keys lack: what is found in sealed pages is
            brought back from their basis (`basis.sealed`). None: it is left in that.
        sinks: of `Softmax`.
        merged: [B * N, Hq, D] and [B * N, Hq], written.
    """
    tokens, q_heads, dim = merged.out.shape
    group = q_heads // kv_heads
    launch(
        merge_work_tiles,
        (tokens * q_heads,),
        parts=parts,
        segment_start=segment_start,
        queries=queries,
        key_mean=key_mean,
        sinks=sinks,
        merged=merged,
        SHAPE=HeadShape(kv_heads, group, dim, parts.lse.shape[1] // group),
        num_warps=4,
    )
