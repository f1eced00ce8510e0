# SPDX-License-Identifier: Apache-2.0
"""Memory beside the pages: what sealing and demotion work in, set aside when memory is divided."""

from __future__ import annotations

from typing import NamedTuple

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout

WORKSPACE_SHARE = 1 / 32
"""Of the budget, at most `MOST_BYTES`."""
MOST_BYTES = 60 << 20
"""Holds the 32 pages of a chunk of 2,048 tokens of a model of 32 layers with 8 KV heads."""
MOST_DEMOTED = 16
"""Pages demoted at once: more would be demoted than is needed."""

# Bytes at the peak; `tests/unit/test_workspace.py` measures them.
_GRADED = 96
"""Of one (layer, KV head, token) while pages are graded."""
_KEPT = 16
"""Of the same, afterwards, until they are packed."""
_PACKED = 20
"""Of one element of a layer's keys while keys and values are rotated and packed."""
_PREDICTED = 36
"""Of one element of a layer's keys while importance is predicted from keys and values."""
_DEMOTED = 20
"""The same while they are read back, graded and packed again."""


class Workspace(NamedTuple):
    """How many pages go through at a time.

    Attributes:
        nbytes: what that takes at most.
        graded_pages: pages that are graded together, as far as they are of one sequence.
        packed_pages: pages whose keys and values, of one layer, are packed together.
        predicted_pages: pages whose importance is predicted together.
        demoted_pages: pages demoted together.
    """

    nbytes: int
    graded_pages: int
    packed_pages: int
    predicted_pages: int
    demoted_pages: int


def size_workspace(budget_bytes: int, layout: PageLayout, num_layers: int) -> Workspace:
    """Set a small share of the budget aside; one page at a time always has room.

    The same on all ranks, which seal and demote in step.
    """
    tokens = PAGE_TOKENS * layout.num_kv_heads
    graded, kept = (num_layers * tokens * x for x in (_GRADED, _KEPT))
    packed = tokens * layout.head_dim * _PACKED if layout.rotates else 1
    predicted = tokens * layout.head_dim * _PREDICTED
    demoted = tokens * layout.head_dim * _DEMOTED if layout.high != layout.low else 1
    least = max(graded, kept + packed, kept + predicted, demoted)
    nbytes = max(least, min(int(budget_bytes * WORKSPACE_SHARE), MOST_BYTES))
    pages = nbytes // graded
    return Workspace(
        nbytes,
        graded_pages=pages,
        packed_pages=max(1, (nbytes - pages * kept) // packed),
        predicted_pages=max(1, (nbytes - pages * kept) // predicted),
        demoted_pages=min(MOST_DEMOTED, nbytes // demoted),
    )
