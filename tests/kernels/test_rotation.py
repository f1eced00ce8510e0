# SPDX-License-Identifier: Apache-2.0
"""Rotation of rows: orthogonal, its own inverse, and what it is for."""

import pytest
import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from tests.support.torch_pack import dequantize_rows, quantize_rows

DIMS = {64: 64, 80: 16, 96: 32, 112: 16, 128: 128, 256: 256}
"""head_dim: size of a block."""


@pytest.mark.parametrize(("dim", "block"), DIMS.items())
def test_against_the_definition(dim: int, block: int) -> None:
    """Element i of a block is sum_j (-1)^popcount(i & j) x_j / sqrt(block)."""
    x = torch.randn(3, 5, dim, dtype=torch.float64)
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = torch.tensor(signs, dtype=torch.float64) / block**0.5
    expected = torch.block_diag(*[matrix] * (dim // block)) @ x[..., None]
    torch.testing.assert_close(rotate(x), expected[..., 0])


@pytest.mark.parametrize("dim", DIMS)
def test_products_stay_and_twice_is_nothing(dim: int) -> None:
    gen = torch.Generator().manual_seed(dim)
    q, k = torch.randn(2, 7, 3, dim, generator=gen)
    torch.testing.assert_close((rotate(q) * rotate(k)).sum(-1), (q * k).sum(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(rotate(rotate(k)), k)
    strided = torch.randn(dim, 6, generator=gen).T
    assert torch.equal(rotate(strided), rotate(strided.contiguous()))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_outlier_channels_cost_less(bits: int) -> None:
    keys = torch.randn(500, 128, generator=torch.Generator().manual_seed(bits))
    keys[:, [3, 40, 77, 101]] *= 10
    codes, meta = quantize_rows(keys, bits)
    plain = (dequantize_rows(codes, meta, bits) - keys).norm()
    codes, meta = quantize_rows(rotate(keys), bits)
    rotated = (rotate(dequantize_rows(codes, meta, bits)) - keys).norm()
    assert rotated < 0.6 * plain
