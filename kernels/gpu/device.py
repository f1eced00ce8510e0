# SPDX-License-Identifier: Apache-2.0
"""Which implementation a tensor's device asks for."""

from __future__ import annotations

import torch

MULTIPROCESSORS = {"meta": 132, "cpu": 2}
"""Where there is no GPU to ask: of an H100 or H200; and few for Triton's interpreter, which runs
one program after the other."""


def on_gpu(x: torch.Tensor) -> bool:
    """Whether operations on ``x`` are Triton kernels.

    Meta tensors stand for a GPU's where only the launches matter: they are recorded (`launch`).
    """
    return x.device.type in ("cuda", "meta")


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; elsewhere those that `MULTIPROCESSORS` assumes."""
    if device.type != "cuda":
        return MULTIPROCESSORS[device.type]
    return torch.cuda.get_device_properties(device).multi_processor_count
