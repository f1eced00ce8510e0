# SPDX-License-Identifier: Apache-2.0
"""Attention of many new queries per sequence: over sealed pages, and over open (raw) pages.

The two parts of a sequence are disjoint and are merged by `merge.merge_states`; `prefill.Prefill`
does both for all layers of a step. On a GPU they are Triton kernels (``triton.py``), on a CPU
compiled C++ (``cpu.py``); ``naive.py`` is the reference.
"""

from __future__ import annotations

from sglang_diffxkv.kernels.dispatch import operation
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedPages
from sglang_diffxkv.kernels.softmax import Softmax

__all__ = ["extend_open", "extend_sealed"]


@operation
def extend_sealed(queries: Queries, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    """Attention of every query over all kept tokens of its sequence's sealed pages.

    The pages lie before every query, so there is no causal mask. Computed in fp32; on a GPU with
    queries and weights in fp16, where the keys and values are codes.

    Args:
        queries: elements of raw tiers are of the same dtype. Rotated, where the sealed keys are.
        softmax: of the layer, whose window and sinks are left out. With a cap sealed keys must lack
            no mean, as scores that all lack the same do not have the same cap.
    """
    return extend_sealed.on(queries.q)(queries, sealed, softmax)


@operation
def extend_open(queries: Queries, opened: OpenPages, softmax: Softmax) -> AttentionState:
    """Causal attention of every query over the tokens of its sequence's open pages.

    Earlier pages may have gaps between them, as sealed pages may lie in between. Slots after a
    sequence's last query are not read into the computation. Computed in fp32 on a CPU.

    Args:
        opened: of the queries' dtype; the new tokens are written already. With a window, pages
            before it may be left out.
        softmax: of the layer, whose sinks are left out.

    Raises:
        ValueError: a page of new tokens is not listed; not noticed on a GPU.
    """
    return extend_open.on(queries.q)(queries, opened, softmax)
