# SPDX-License-Identifier: Apache-2.0
"""The free stack at a million pages: taking frames for many owners, and giving them back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.device import kernels
from bench.gpu.timing.timer import Deadline, interleaved

MAX_FRAMES = 33
PAGES = 1 << 20
OWNERS = (1024, 16384, 262144)
"""(page, layer)s of a batch that is sealed at once."""


def _take_and_return(
    stack: torch.Tensor, n_free: torch.Tensor, counts: torch.Tensor, _: int
) -> None:
    taken = kernels("arena").take_frames(stack, n_free, counts, MAX_FRAMES)
    kernels("arena").return_frames(stack, n_free, taken)


def _take(stack: torch.Tensor, n_free: torch.Tensor, counts: torch.Tensor, _: int) -> None:
    n_free.fill_(len(stack))
    kernels("arena").take_frames(stack, n_free, counts, MAX_FRAMES)


def run(device: torch.device, deadline: Deadline, red: Collection[str]) -> Iterator[dict[str, Any]]:
    """Take and return together leave the stack as it was, so that they can be repeated."""
    if "arena" in red:
        yield {"skipped": "arena crashed or gave NaN"}
        return
    cuda = device.type == "cuda"
    size = PAGES * 8 if cuda else 5000
    stack = (torch.randperm(size, device=device) - torch.arange(size, device=device)).int()
    n_free = torch.tensor([size], dtype=torch.int32, device=device)
    for owners in OWNERS if cuda else (64,):
        if deadline.left() < 3:
            return
        counts = torch.randint(1, 17, (owners,), dtype=torch.int32, device=device)
        candidates = {
            "take and return": partial(_take_and_return, stack, n_free, counts),
            "take": partial(_take, stack, n_free, counts),
        }
        timed = interleaved(candidates, 1, device, seconds=0.1)
        n_free.fill_(size)
        yield {
            "owners": owners,
            "frames": int(counts.sum()),
            "stack": size,
            "times": {name: t._asdict() for name, t in timed.items()},
        }
