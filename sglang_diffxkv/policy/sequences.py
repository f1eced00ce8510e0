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


def pooled(importance: torch.Tensor, kernel: int = 7) -> torch.Tensor:
    """Average over neighbours, zeros beyond both ends: float32 [L, H, T], finite.

    So that clusters of tokens are kept and not lone ones (SnapKV, XKV). A NaN makes its own token
    worth the most and leaves its neighbours as they are.
    """
    most = torch.finfo(torch.float32).max
    wrong = importance.isnan()
    pooled = torch.nn.functional.avg_pool1d(
        importance.masked_fill(wrong, 0), kernel, stride=1, padding=kernel // 2
    )
    # Finite, because only tokens that are kept in any case may be worth inf.
    return pooled.clamp(max=most).masked_fill(wrong, most)
