# SPDX-License-Identifier: Apache-2.0
"""Which implementation a tensor's device asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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


_assumed_capability: ContextVar[int] = ContextVar("assumed_capability", default=90)


@contextmanager
def assumed_capability(capability: int) -> Iterator[None]:
    """Within this context kernels are launched as they would be on a GPU of this capability.

    Where there is a GPU, that is asked instead.
    """
    token = _assumed_capability.set(capability)
    try:
        yield
    finally:
        _assumed_capability.reset(token)


def compute_capability(device: torch.device) -> int:
    """Of a GPU, as in sm_90; elsewhere what `assumed_capability` says, or an H100's."""
    if device.type != "cuda":
        return _assumed_capability.get()
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
