# SPDX-License-Identifier: Apache-2.0
"""Attention states beside those of a reference, and lists of queries."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from sglang_diffxkv.kernels.merge import AttentionState


def indptr(*counts: int) -> torch.Tensor:
    """Begins int32 [B + 1] of so many entries of each sequence."""
    return torch.tensor([0, *counts]).cumsum(0).int()


def moved(args: Any, device: torch.device | str) -> Any:
    """The same with its tensors, in NamedTuples, too, on another device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, args)


def assert_close(part: AttentionState, expected: AttentionState, tolerance: float) -> None:
    """Within ``tolerance`` of the norm, LSEs within ten times as much or 1e-3."""
    part = AttentionState(*(x.cpu() for x in part))
    assert part.out.dtype == part.lse.dtype == torch.float32
    assert part.out.shape == expected.out.shape and part.lse.shape == expected.lse.shape
    empty = expected.lse == -torch.inf
    assert torch.equal(part.lse == -torch.inf, empty)
    assert (part.out[empty] == 0).all()
    error = (part.out - expected.out).double().norm() / expected.out.double().norm().clamp(1e-9)
    assert error <= tolerance
    lse_tolerance = max(tolerance, min(10 * tolerance, 1e-3))
    assert ((part.lse - expected.lse)[~empty].abs() <= lse_tolerance).all()
