# SPDX-License-Identifier: Apache-2.0
"""Triton: a sink of each head takes its part of the weight."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.softmax import LOG2_E

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["rows"])
def sink_rows(state, sinks, rows, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """`merge.add_sinks`, in place, of rows ``[program_id(0) * ROWS, ...)`` of T * HEADS.

    Args:
        state: `AttentionState`, contiguous: fp32 [rows, DIM] and [rows].
        sinks: fp32 [HEADS].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, triton.next_power_of_2(DIM))
    mask = row < rows
    inside = mask[:, None] & (column < DIM)[None, :]
    lse = tl.load(state.lse + row, mask=mask, other=0)
    sink = tl.load(sinks + row % HEADS) * _LOG2_E
    top = tl.maximum(lse, sink)  # finite, as sinks are
    weight = tl.exp2(lse - top)
    total = weight + tl.exp2(sink - top)
    at = state.out + row[:, None] * DIM + column[None, :]
    out = tl.load(at, mask=inside, other=0) * (weight / total)[:, None]
    tl.store(at, out, mask=inside)
    tl.store(state.lse + row, top + tl.log2(total), mask=mask)
