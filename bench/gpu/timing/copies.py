# SPDX-License-Identifier: Apache-2.0
"""Frames to the host and back by the kernel, beside one copy of as many bytes in a row."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.gpu.device import kernels
from bench.gpu.timing.timer import Candidate, Deadline, interleaved

FRAME_BYTES = (512, 3328, 8448)
"""Of Llama-3.1-70B's ranks, Llama-3.1-8B, and that with a raw tier."""
NBYTES = 64 << 20
"""Moved at a time, from an arena of twice as much."""
WIDTH = 32
"""Of a table of frames, of which half of the entries are in use."""
PROGRAMS = (4, 64)
"""Beside what ships."""
COPIES = 2


class Copy(NamedTuple):
    """Frames of an arena and places for them in another: int32 [rows, WIDTH], -1 for none."""

    source: torch.Tensor
    source_ids: torch.Tensor
    target: torch.Tensor
    target_ids: torch.Tensor


def draw(frame_bytes: int, nbytes: int, to_host: bool, device: torch.device) -> Copy:
    """``nbytes`` of random frames, to random places."""
    count = nbytes // frame_bytes // WIDTH * WIDTH
    pinned = device.type == "cuda"
    host = torch.empty(2 * count, frame_bytes, dtype=torch.uint8, pin_memory=pinned)
    here = torch.randint(0, 256, (2 * count, frame_bytes), dtype=torch.uint8, device=device)
    host.copy_(here)
    used = torch.arange(WIDTH) < WIDTH // 2
    ids = [torch.randperm(2 * count)[:count].view(-1, WIDTH // 2) for _ in range(2)]
    tables = [torch.full((len(ids[0]), WIDTH), -1, dtype=torch.int32) for _ in range(2)]
    for table, chosen in zip(tables, ids, strict=True):
        table[:, used] = chosen.int()
    old, new = (table.to(device) for table in tables)
    source, target = (here, host) if to_host else (host, here)
    return Copy(source, old, target, new)


def _by_kernel(copies: list[Copy], programs: int, i: int) -> None:
    with patch.object(kernels("arena"), "COPY_PROGRAMS", programs):
        kernels("arena").copy_frames(*copies[i])


def _in_a_row(copies: list[Copy], i: int) -> None:
    source, ids, target, _ = copies[i]
    count = ids.numel() // 2
    target[:count].copy_(source[:count], non_blocking=True)


def run(device: torch.device, deadline: Deadline, red: Collection[str]) -> Iterator[dict[str, Any]]:
    """A record for each size of frames and direction."""
    if "arena" in red:
        yield {"skipped": "copies: arena crashed or gave NaN"}
        return
    nbytes = NBYTES if device.type == "cuda" else 64 << 10
    shipped = kernels("arena").COPY_PROGRAMS
    for frame_bytes in FRAME_BYTES:
        for to_host in (True, False):
            if deadline.left() < 3:
                return
            copies = [draw(frame_bytes, nbytes, to_host, device) for _ in range(COPIES)]
            candidates: dict[str, Candidate] = {
                f"{programs} programs": partial(_by_kernel, copies, programs)
                for programs in (shipped, *PROGRAMS)
            }
            candidates["in a row"] = partial(_in_a_row, copies)
            timed = interleaved(candidates, COPIES, device, seconds=0.2)
            yield {
                "frame_bytes": frame_bytes,
                "direction": "to the host" if to_host else "from the host",
                "bytes": int((copies[0].source_ids >= 0).sum()) * frame_bytes,
                "times": {name: t._asdict() for name, t in timed.items()},
            }
