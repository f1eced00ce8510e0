# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `bench.gpu.remote.shim.kernels` compute, in torch and float64."""

from __future__ import annotations

import torch


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.double().chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


def rope(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [T, H, D]; the halves of D are the real and the imaginary parts."""
    cos, sin = cos_sin.double()[positions][:, None].chunk(2, -1)
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
