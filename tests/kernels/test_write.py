# SPDX-License-Identifier: Apache-2.0
"""New tokens: one kernel writes keys and values and rotates queries, as the reference does it."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.write import NewQKV, triton
from tests.support.builders import error_norm
from tests.support.device import DEVICE

SHAPES = [(1, 1, 16), (4, 1, 128), (32, 8, 128), (14, 2, 64), (5, 5, 80), (3, 3, 96), (16, 8, 256)]


@pytest.mark.parametrize(("q_heads", "heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_the_definition(q_heads: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Slices of one projection, as models have them; raw pages are poisoned, two rows padding."""
    tokens, pages = 5, 3
    gen = torch.Generator().manual_seed(q_heads * dim)
    widths = [q_heads * dim, heads * dim, heads * dim]
    qkv = torch.randn(tokens, sum(widths), generator=gen).to(dtype).to(DEVICE)
    q, k, v = (x.unflatten(1, (-1, dim)) for x in qkv.split(widths, dim=1))
    rows = torch.tensor([70, 0, 191, 64, 0], device=DEVICE)
    raw = torch.full((2, pages, PAGE_TOKENS, heads, dim), math.nan, dtype=dtype, device=DEVICE)
    rotated = triton.write_tokens(NewQKV(q, k, v, rows), *raw)
    assert rotated.is_contiguous() and rotated.dtype == torch.float32
    assert error_norm(rotated.cpu(), rotate(q.cpu().double())) < 1e-6
    written = [70, 191, 64]
    for pages_of, new in zip(raw, (k, v), strict=True):
        flat = pages_of.flatten(0, 1)
        assert torch.equal(flat[written], new[[0, 2, 3]])
        assert flat[0].isfinite().all()  # of padding, whichever came last
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[[*written, 0]] = False
        assert flat.cpu()[untouched].isnan().all()


def test_other_dtypes_are_cast() -> None:
    q, k, v = torch.randn(3, 2, 1, 64).to(DEVICE)
    raw = torch.zeros(2, 1, PAGE_TOKENS, 1, 64, dtype=torch.float16, device=DEVICE)
    triton.write_tokens(NewQKV(q, k, v, torch.tensor([3, 9], device=DEVICE)), *raw)
    assert torch.equal(raw[0, 0, [3, 9]], k.half()) and torch.equal(raw[1, 0, [3, 9]], v.half())
