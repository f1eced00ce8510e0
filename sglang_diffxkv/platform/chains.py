# SPDX-License-Identifier: Apache-2.0
"""What SGLang's speculative workers do to chains of drafts, in torch.

For each function SGLang has a kernel for GPUs, in Triton or CUDA, which the docstrings name. A
chain is a tree without branches: the ``N`` nodes of a sequence are its last token and ``N - 1``
drafts, each the child of the one before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Links(NamedTuple):
    """What describes the nodes of B trees; written in place.

    Attributes:
        positions: [B * N].
        index: [B, N] the nodes' numbers in the batch.
        child: [B, N] each node's first child, -1 where it has none.
        sibling: [B, N] the next child of its parent, -1 where there is none.
    """

    positions: torch.Tensor
    index: torch.Tensor
    child: torch.Tensor
    sibling: torch.Tensor


class Accepted(NamedTuple):
    """What was accepted of B trees of N nodes; written in place.

    Attributes:
        tokens: [B * N] int32: what follows each node that was accepted; others are left alone.
        index: [B, N] int32: numbers of the accepted nodes, the last token's first, then -1.
        count: [B] int32: accepted drafts.
    """

    tokens: torch.Tensor
    index: torch.Tensor
    count: torch.Tensor


def extend_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    **sizes: object,
) -> torch.Tensor:
    """Slots [sum of lengths], int64, of the positions from ``start_offset`` up to ``end_offset``.

    Instead of ``assign_extend_cache_locs``.

    Args:
        req_pool_indices: [B] rows of ``req_to_token``.
        start_offset, end_offset: [B].
        sizes: what follows from these.
    """
    rows, positions = _ranges(start_offset, end_offset)
    return req_to_token[req_pool_indices[rows], positions].long()


def draft_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    topk: int,
    num_cols: int,
    **unused: None,
) -> None:
    """Write to ``out_cache_loc`` [B * num_cols] the slots of the positions behind ``seq_lens``.

    Instead of ``assign_draft_cache_locs_contiguous``. ``topk`` is 1; `unused` are outputs that
    SGLang asks for on GPUs alone.
    """
    ends = seq_lens + topk * num_cols
    out_cache_loc.copy_(extend_slots(req_pool_indices, req_to_token, seq_lens, ends))


def write_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write slots [sum of lengths] to ``req_to_token``, from ``start_offset`` to ``end_offset``.

    Instead of ``assign_req_to_token_pool``; the inverse of `extend_slots`.
    """
    rows, positions = _ranges(start_offset, end_offset)
    slots = out_cache_loc[: len(rows)].to(req_to_token.dtype)
    req_to_token[req_pool_indices[rows], positions] = slots


def _ranges(starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and position of each element of [start, end), row after row."""
    lengths = (ends - starts).long()
    rows = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows)) - before[rows] + starts.long()[rows]


def link_chains(seq_lens: torch.Tensor, links: Links) -> None:
    """Describe chains behind ``seq_lens`` [B] tokens.

    Instead of ``reconstruct_indices_from_tree_mask`` and ``build_tree_kernel_efficient``.
    """
    batch, nodes = links.index.shape
    steps = torch.arange(nodes)
    links.positions.view(batch, nodes).copy_(seq_lens[:, None] + steps)
    links.index.copy_(torch.arange(batch * nodes).view(batch, nodes))
    links.child.copy_(steps + 1)
    links.child[:, -1] = -1
    links.sibling.fill_(-1)


def mask_chains(prefix_lens: list[int], nodes: int, mask: torch.Tensor) -> None:
    """Write a causal mask among the nodes of each chain to ``mask``, flat, bool.

    Instead of what ``build_tree_kernel_efficient`` does to it. In each of a chain's ``nodes`` rows,
    as many columns as ``prefix_lens`` says stand before those of the nodes, and are left alone.
    """
    causal = torch.ones(nodes, nodes, dtype=torch.bool).tril()
    begin = 0
    for before in prefix_lens:
        end = begin + nodes * (before + nodes)
        mask[begin:end].view(nodes, before + nodes)[:, before:] = causal
        begin = end


def verify_greedy(
    candidates: torch.Tensor, target_predict: torch.Tensor, accepted: Accepted
) -> None:
    """Accept drafts as long as they are what the target says.

    Instead of ``verify_tree_greedy``.

    Args:
        candidates: [B, N] the last token and the drafts.
        target_predict: [B, N] the target's next tokens.
    """
    accept(candidates[:, 1:] == target_predict[:, :-1], target_predict, accepted)


def accept(right: torch.Tensor, tokens: torch.Tensor, accepted: Accepted) -> torch.Tensor:
    """Write what is accepted; returns how many drafts, [B].

    Args:
        right: [B, N - 1] drafts that are accepted where all before them are.
        tokens: [B, N] what follows each node.
    """
    batch, nodes = tokens.shape
    count = right.long().cumprod(1).sum(1)
    taken = torch.arange(nodes) <= count[:, None]
    numbers = torch.arange(batch * nodes).view(batch, nodes)
    accepted.count.copy_(count)
    accepted.index.copy_(torch.where(taken, numbers, -1))
    accepted.tokens.view(batch, nodes)[taken] = tokens[taken].to(accepted.tokens.dtype)
    return count


def last_tokens(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """Write to ``bonus_tokens`` [B] the last of each sequence's accepted tokens [B, stride].

    Instead of ``fill_bonus_tokens``.
    """
    tokens = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens.copy_(tokens.gather(1, accept_lens.long()[:, None] - 1)[:, 0])
