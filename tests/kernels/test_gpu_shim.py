# SPDX-License-Identifier: Apache-2.0
"""The kernels that stand in for SGLang's in the bench, against torch in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.gpu.remote.shim import kernels, naive
from bench.gpu.verify.check import relative_error

BF16 = torch.bfloat16
TOLERANCE = 4e-3
"""Outputs are bf16."""


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 200)])
def test_rmsnorm(rows: int, size: int) -> None:
    x, weight = torch.randn(rows, size).to(BF16), torch.randn(size).to(BF16)
    out = kernels.rmsnorm(x, weight, 1e-5)
    assert out.dtype == BF16
    assert relative_error(out, naive.rmsnorm(x, weight, 1e-5)) < TOLERANCE


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 200)])
def test_fused_add_rmsnorm_is_in_place(rows: int, size: int) -> None:
    x, residual, weight = (torch.randn(n, size).to(BF16) for n in (rows, rows, 1))
    added = x.double() + residual.double()
    kernels.fused_add_rmsnorm(x, residual, weight[0], 1e-5)
    assert relative_error(residual, added) < TOLERANCE
    assert relative_error(x, naive.rmsnorm(added, weight[0], 1e-5)) < TOLERANCE


@pytest.mark.parametrize(("rows", "size"), [(1, 3), (2, 1100)])
def test_silu_and_mul(rows: int, size: int) -> None:
    x = torch.randn(rows, 2 * size).to(BF16)
    out = torch.full((rows, size), torch.nan, dtype=BF16)
    kernels.silu_and_mul(x, out)
    assert relative_error(out, naive.silu_and_mul(x)) < TOLERANCE


def test_rope_rotates_views_and_stores_what_the_pool_takes() -> None:
    """Queries of more heads than a program takes, as slices of the projection's output."""
    tokens, heads, kv_heads, dim = 3, 11, 2, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(BF16)
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    q, k = q.view(tokens, heads, dim), k.view(tokens, kv_heads, dim)
    angles = torch.rand(50, dim // 2) * 6
    cos_sin, positions = torch.cat((angles.cos(), angles.sin()), 1), torch.tensor([49, 0, 7])
    expected = [naive.rope(x, cos_sin, positions) for x in (q, k)]
    k_cache, v_cache = (torch.full((9, kv_heads, dim), torch.nan, dtype=BF16) for _ in range(2))
    slots = torch.tensor([8, 0, 3])  # 0 is what graphs are padded with
    store = SimpleNamespace(value=v, k_buffer=k_cache, v_buffer=v_cache, cache_loc=slots)
    kernels.apply_rope_with_cos_sin_cache_inplace(
        q, k, cos_sin, positions, is_neox=True, fused_args=store
    )
    for x, y in zip((q, k), expected, strict=True):
        assert relative_error(x, y) < TOLERANCE
    assert torch.equal(k_cache[slots[::2]], k[::2])
    assert torch.equal(v_cache[slots[::2]], v.view(tokens, kv_heads, dim)[::2])
    untouched = [i for i in range(9) if i not in (3, 8)]
    assert k_cache[untouched].isnan().all() and v_cache[untouched].isnan().all()
