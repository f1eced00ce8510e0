# SPDX-License-Identifier: Apache-2.0
"""Pages of one sequence that are sealed together, for policies that judge them together."""

from collections.abc import Iterator

import torch

from sglang_diffxkv.policy.base import SealContext


def sequences(ctx: SealContext, least: int = 1) -> Iterator[torch.Tensor]:
    """The pages of each sequence by position: int64 [P] indices into the context's pages.

    Waits for the device, unless all pages are judged by themselves.

    Args:
        least: sequences with fewer pages are left out.
    """
    if ctx.sequence is None:
        if least <= 1:
            yield from torch.arange(len(ctx.position), device=ctx.position.device).split(1)
        return
    order = ctx.position.argsort(stable=True)
    order = order[ctx.sequence[order].argsort(stable=True)]
    counts = ctx.sequence.unique(return_counts=True)[1]
    yield from (pages for pages in order.split(counts.tolist()) if len(pages) >= least)
