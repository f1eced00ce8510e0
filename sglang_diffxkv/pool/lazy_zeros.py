# SPDX-License-Identifier: Apache-2.0
"""Large zeroed tensors of the host that take memory only where they are written, or are pinned."""

from __future__ import annotations

import contextlib
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
    return torch.frombuffer(_mapped(nbytes), dtype=dtype).view(shape)


def _mapped(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)


def pinned_zeros(*shape: int, device: torch.device) -> torch.Tensor:
    """Zero bytes in host memory, uint8, which ``device`` can read and write where it is a GPU.

    Pinned in place, until the process ends: torch's own allocator of pinned memory rounds up to a
    power of two. Pages come from the NUMA node of the thread that calls this.

    Raises:
        RuntimeError: the host does not let us have so much.
    """
    pages = _mapped(math.prod(shape))
    memory = torch.frombuffer(pages, dtype=torch.uint8).view(shape)
    if device.type == "cuda":
        # A child of a fork would get copies of all pinned pages, or the device's writes be lost.
        pages.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # kernels without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)  # fewer to pin
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(error) != 0:
            gib = memory.nbytes / 2**30
            raise RuntimeError(f"diffxkv: {gib:.1f} GiB of host_bytes cannot be pinned ({error})")
    return memory
