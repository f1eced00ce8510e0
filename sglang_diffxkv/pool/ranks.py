# SPDX-License-Identifier: Apache-2.0
"""What the ranks that serve one model agree on: how many frames are allocated to a page.

Each rank seals its own KV heads, so a page takes more frames on one than on another; but all run
the scheduler, and must admit, evict and retract alike. They do, because they decide by the ledger
and by tables that hold the same everywhere, and both count what is *allocated* to a page: the most
that it takes on any rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Agree = Callable[[torch.Tensor], torch.Tensor]
"""Maximum over the ranks, element by element: a new tensor, or the given one, with the same values
on all of them. Every rank calls it in the same order with the same shape, as in any collective."""


def alone(values: torch.Tensor) -> torch.Tensor:
    """`Agree` of a single rank."""
    return values
