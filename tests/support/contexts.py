# SPDX-License-Identifier: Apache-2.0
"""What a policy is told of pages that are to be sealed."""

from __future__ import annotations

import torch

from sglang_diffxkv.policy.base import SealContext
from sglang_diffxkv.policy.quality import Quality
from tests.support.policies import Shape

SHAPE = Shape(layers=5, heads=2, dim=128, dtype=torch.bfloat16)
PAGES = 12


def context(
    pages: int = PAGES, seed: int = 0, quality: Quality = Quality.BALANCED, sharp: float = 2.0
) -> SealContext:
    """Pages of one sequence; attention is more peaked in later layers."""
    rng = torch.Generator().manual_seed(seed)
    exponent = sharp * torch.arange(1, SHAPE.layers + 1)[:, None, None]
    values = torch.rand(pages, SHAPE.layers, SHAPE.heads, 64, generator=rng) ** exponent * (
        exponent + 1
    )
    length = pages * 64 + 64
    return SealContext(
        importance=values / length,
        count=torch.full((pages, 64), 9.0),
        position=torch.arange(pages),
        context=torch.full((pages,), length),
        sequence=torch.zeros(pages, dtype=torch.int64),
        quality=torch.full((pages,), int(quality)),
    )
