# SPDX-License-Identifier: Apache-2.0
"""Large zeroed tensors that take memory on a CPU only where they are written."""

from __future__ import annotations

import math
import mmap
import sys

import torch

MIN_BYTES = 1 << 20
"""Smaller tensors are torch's business."""
_LINUX_NORESERVE = 0x4000  # of x86-64 and ARM; Python names it from 3.13 on
_NORESERVE = getattr(mmap, "MAP_NORESERVE", _LINUX_NORESERVE if sys.platform == "linux" else 0)


def lazy_zeros(*shape: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeros of this shape.

    On a CPU large ones are pages of the kernel that become resident one by one as they are written,
    and may together be more than the host has: a table costs what is in it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < MIN_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
