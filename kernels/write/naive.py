# SPDX-License-Identifier: Apache-2.0
"""Readable reference."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.write import NewQKV


def write_tokens(new: NewQKV, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """See `write.write_tokens`."""
    keys.flatten(0, 1)[new.rows] = new.k.to(keys.dtype)
    values.flatten(0, 1)[new.rows] = new.v.to(values.dtype)
    return rotate(new.q.float())
