# SPDX-License-Identifier: Apache-2.0
"""Normalised block Hadamard over head_dim: spreads outlier channels before rows are quantized.

The matrix is orthogonal, so q.k is the same with both rotated, and symmetric, so it is its own
inverse (QuaRot, arXiv 2404.00456, rotates keys and values likewise).
"""

from __future__ import annotations

from functools import cache

import torch


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate rows [..., D], or rotate them back; of x's dtype.

    Blocks are the largest power of two that divides D: 128 for 128, 16 for 80, 32 for 96.
    """
    dim = x.shape[-1]
    block = hadamard(dim & -dim, x.dtype, x.device)
    return (x.reshape(-1, len(block)) @ block).view(x.shape)


@cache  # for good: CUDA graphs keep its address
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix [size, size] divided by sqrt(size); size is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(dtype)
