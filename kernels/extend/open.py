# SPDX-License-Identifier: Apache-2.0
"""Many queries over open raw pages: earlier tokens without a mask, the new tokens causally.

Earlier pages may have gaps between them, as sealed pages may lie in between. On a GPU a Triton
kernel does it (`prefill` prefers FlashInfer), on a CPU compiled C++ (`cpu`). Without a compiler it
is torch, split at the first new token: both products are then dense, and no [T, L] mask is made.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from sglang_diffxkv.kernels.extend import cpu
from sglang_diffxkv.kernels.extend.dense import (
    attend_all,
    attend_causal,
    heads_first,
)
from sglang_diffxkv.kernels.extend.lists import OpenList
from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, concat_states, empty_state, merge_states


def extend_open(
    q: torch.Tensor,
    q_indptr: torch.Tensor,
    q_position: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
    page_position: torch.Tensor,
    sm_scale: float,
) -> AttentionState:
    """Causal attention of every query over the tokens of its sequence's open pages.

    Computed in fp32 on a CPU. Slots after a sequence's last query are not read into the
    computation.

    Args:
        q: [T, Hq, D], the new queries; those of a sequence have consecutive positions.
        q_indptr: int32 [B + 1], queries of each sequence.
        q_position: int32 [B], position of each sequence's first query.
        k_raw, v_raw: [R, 64, H, D] raw pages of q's dtype; the new tokens are written already.
        indptr: int32 [B + 1], into ``slots``.
        slots: int32 [N], raw page of each listed page, by increasing position.
        page_position: int32 [N]; token j of a page has position ``page_position * 64 + j``.
        sm_scale: factor of the scores.

    Raises:
        ValueError: a page of new tokens is not listed; not noticed on a GPU.
    """
    if on_gpu(q):
        from sglang_diffxkv.kernels.extend import triton

        return triton.extend_open(
            q, q_indptr, q_position, k_raw, v_raw, indptr, slots, page_position, sm_scale
        )
    library = cpu.library()
    if library is not None:
        lists = OpenList(q_position, indptr, slots, page_position)
        step = cpu.Extend(library, q_indptr, lists, None)
        return step.run(q, (k_raw, v_raw), None, sm_scale)
    parts = []
    queries, starts, bounds = q_indptr.tolist(), q_position.tolist(), indptr.tolist()
    for b, start in enumerate(starts):
        mine = q[queries[b] : queries[b + 1]]
        if len(mine) == 0:
            continue
        listed = slice(bounds[b], bounds[b + 1])
        prior = _tokens_before(page_position[listed].tolist(), start, len(mine))
        tokens = prior + len(mine)
        used = slots[listed][: -(-tokens // PAGE_TOKENS)].long()
        k, v = (heads_first(raw[used].flatten(0, 1)[:tokens]) for raw in (k_raw, v_raw))
        parts.append(_attend(mine, k, v, prior, sm_scale))
    return concat_states(parts) if parts else empty_state(q)


def _tokens_before(listed: list[int], start: int, new: int) -> int:
    """Tokens of the listed pages that lie before position ``start``, all of them written.

    Args:
        listed: increasing page positions.
        start: position of the first new token.
        new: number of new tokens.
    """
    first, last = start // PAGE_TOKENS, (start + new - 1) // PAGE_TOKENS
    at = bisect_left(listed, first)
    if listed[at : at + last - first + 1] != list(range(first, last + 1)):
        raise ValueError(f"open pages {listed} lack new tokens of pages {first} to {last}")
    return at * PAGE_TOKENS + start % PAGE_TOKENS


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prior: int, sm_scale: float
) -> AttentionState:
    """q [t, Hq, D] over k, v [H, L, D], of which ``prior`` tokens precede the first query."""
    t = len(q)
    if t == 1:
        return attend_all(q, k[:, : prior + 1], v[:, : prior + 1], sm_scale)
    new = slice(prior, prior + t)
    part = attend_causal(q, k[:, new], v[:, new], sm_scale)
    if prior == 0:
        return part
    return merge_states(attend_all(q, k[:, :prior], v[:, :prior], sm_scale), part)
