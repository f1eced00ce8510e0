# SPDX-License-Identifier: Apache-2.0
"""Checks of the arena's free stack: the same ids in the same places."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from bench.gpu.device import kernels
from bench.gpu.verify.check import Check, Found, differing, worst
from sglang_diffxkv.kernels.arena import cpu, naive

MAX_FRAMES = 33


def check(owners: int, reference: ModuleType, device: torch.device) -> Found:
    """Take frames for many owners, give half of the table back, in other columns than taken."""
    counts = torch.randint(0, MAX_FRAMES + 1, (owners,), dtype=torch.int32)
    counts[:: max(2, owners // 3)] = 0
    size = int(counts.sum()) + 7
    stack = (torch.randperm(size) - torch.arange(size)).int()
    results = []
    for module, where in ((reference, torch.device("cpu")), (kernels("arena"), device)):
        mine = stack.clone().to(where)
        n_free = torch.tensor([size - 2], dtype=torch.int32, device=where)
        frames = module.take_frames(mine, n_free, counts.to(where), MAX_FRAMES)
        taken = n_free.clone()
        back = torch.where(frames % 2 == 0, frames, -1).flip(1)
        module.return_frames(mine, n_free, back)
        results.append((frames, taken, n_free, mine[: int(n_free)]))
    return worst([differing(ours, true) for true, ours in zip(*results, strict=True)])


def checks(large: bool) -> Iterator[Check]:
    for owners in (0, 1, 5, 301):
        yield Check(
            f"arena, {owners} owners", "arena", 0, partial(check, owners, naive), timed=True
        )
    if large:
        run = partial(check, 100_003, cpu)
        yield Check("arena, 100003 owners", "arena", 0, run, timed=True)
