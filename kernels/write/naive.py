# SPDX-License-Identifier: Apache-2.0
"""Readable reference."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate


def write_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
) -> torch.Tensor:
    """See `write.write_tokens`."""
    k_raw.flatten(0, 1)[rows] = k.to(k_raw.dtype)
    v_raw.flatten(0, 1)[rows] = v.to(v_raw.dtype)
    return rotate(q.float())
