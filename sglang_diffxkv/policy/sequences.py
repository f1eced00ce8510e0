# SPDX-License-Identifier: Apache-2.0
"""Pages of one sequence that are sealed together, for policies that judge them together."""

from collections.abc import Iterator

import torch

from sglang_diffxkv.policy.base import SealContext


def sequences(ctx: SealContext) -> Iterator[torch.Tensor]:
    """The pages of each sequence by position: int64 [P] indices into the context's pages."""
    order = ctx.position.argsort(stable=True)
    order = order[ctx.sequence[order].argsort(stable=True)]
    counts = ctx.sequence.unique(return_counts=True)[1]
    yield from order.split(counts.tolist())
