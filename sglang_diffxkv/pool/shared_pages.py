# SPDX-License-Identifier: Apache-2.0
"""Counting the pages of requests that share some of them in SGLang's radix tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_diffxkv.kernels.layout import PAGE_TOKENS


class PagedSequence(NamedTuple):
    """A request, as far as it decides which pages it takes.

    Attributes:
        node: the node of the radix tree that its cached prefix ends at.
        cached: tokens of that prefix, in whole pages.
        length: tokens that it has, or may get.
    """

    node: int
    cached: int
    length: int


def paged(req: Any, length: int) -> PagedSequence:
    """SGLang's ``Req`` with so many tokens, matched with the tree or running."""
    return PagedSequence(req.last_node, req.kv.cache_protected_len, length)


def distinct_pages(tree_cache: Any, sequences: Sequence[PagedSequence]) -> int:
    """Pages that ``sequences`` take together: those in the tree once, all others for each.

    Only the tree lets requests share: equal prompts that nobody has cached yet take pages of their
    own, and what they take together becomes less, never more, when SGLang caches them.

    Costs a step for each node between a prefix and the root, whatever the pool's size.
    """
    private = sum(-(-s.length // PAGE_TOKENS) - s.cached // PAGE_TOKENS for s in sequences)
    nodes = {s.node for s in sequences if s.cached}
    if not nodes:
        return private
    paths = tree_cache.tree_core.collect_path_info(list(nodes))
    tokens = {node.node_id: node.path_end - node.path_start for path in paths for node in path}
    return private + sum(tokens.values()) // PAGE_TOKENS
