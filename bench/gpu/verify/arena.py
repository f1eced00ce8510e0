# SPDX-License-Identifier: Apache-2.0
"""Checks of the arena: the same ids in the same places of its free stack; copies of frames."""

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


def check_copies(frame_bytes: int, to_host: bool, device: torch.device) -> Found:
    """From or to memory of the host: what is listed, and no byte beside it."""
    frames, shape = 997, (3, 11, 32)
    pinned = device.type == "cuda"
    here, host = torch.randint(0, 256, (2, frames, frame_bytes), dtype=torch.uint8)
    there = torch.rand(shape) < 0.5
    count = int(there.sum())
    old, new = torch.full((2, *shape), -1, dtype=torch.int32)
    old[there] = torch.randint(0, frames, (count,), dtype=torch.int32)
    new[there] = torch.randperm(frames, dtype=torch.int32)[:count]
    here, host = here.to(device), host.pin_memory() if pinned else host
    source, target = (here, host) if to_host else (host, here)
    expected = target.to("cpu", copy=True)
    naive.copy_frames(source.cpu(), old, expected, new)
    kernels("arena").copy_frames(source, old.to(device), target, new.to(device))
    if pinned:
        torch.cuda.synchronize(device)
    return differing(target, expected)


def checks(large: bool) -> Iterator[Check]:
    for owners in (0, 1, 5, 301):
        yield Check(
            f"arena, {owners} owners", "arena", 0, partial(check, owners, naive), timed=True
        )
    for frame_bytes in (16, 448, 512, 3328, 8448):
        for to_host in (True, False):
            name = f"copy {frame_bytes} bytes {'to' if to_host else 'from'} the host"
            run = partial(check_copies, frame_bytes, to_host)
            yield Check(name, "arena", 0, run, timed=frame_bytes in (512, 3328, 8448))
    if large:
        run = partial(check, 100_003, cpu)
        yield Check("arena, 100003 owners", "arena", 0, run, timed=True)
