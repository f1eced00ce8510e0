# SPDX-License-Identifier: Apache-2.0
"""Kernels whose machine code is known, compiled: a program of its own, printing JSON.

Triton's interpreter, which other tests switch on for the whole process, must be off here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver, jit

from bench.gpu.compile.build import Job, target_of
from bench.gpu.compile.built import as_json
from bench.gpu.compile.report import problems, tables
from bench.gpu.compile.specialise import distinct, specialise
from bench.gpu.compile.worker import compile_all
from sglang_diffxkv.kernels.gpu.launch import Launch, launch, recorded

ARCH = "sm_90"


class Rows(NamedTuple):
    """``stride`` elements from one row to the next."""

    data: torch.Tensor
    stride: int


@dataclass(frozen=True)
class Shape:
    queries: int
    dim: int


@triton.jit
def attend(q, k, out, n, scale, unused, N: tl.constexpr, SHAPE: tl.constexpr):
    """Products with tiles of keys: [M, D] @ [D, N] @ [N, D], added up over n keys."""
    row, column, dim = tl.arange(0, SHAPE.queries), tl.arange(0, N), tl.arange(0, SHAPE.dim)
    query = tl.load(q + row[:, None] * SHAPE.dim + dim[None, :])
    total = tl.zeros((SHAPE.queries, SHAPE.dim), tl.float32)
    for first in range(0, n, N):
        keys = tl.load(k.data + (first + column)[:, None] * k.stride + dim[None, :])
        scores = tl.dot(query, keys.T) * scale
        total += tl.dot(scores.to(tl.float16), keys)
    tl.store(out + row[:, None] * SHAPE.dim + dim[None, :], total)


@triton.jit
def add(x, out, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < n) + 1.0, mask=at < n)


@triton.jit
def chase(x, out, n):
    """Two loads to an iteration, one from the address that the other gave."""
    at = tl.arange(0, 32)
    total = at.to(tl.int64)
    for _ in range(0, n):
        total = tl.load(x + tl.load(x + total))
    tl.store(out + tl.arange(0, 32), total)


@triton.jit
def wrong(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.arange(0, 2 * SIZE))


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_attend(
    device: str, n: int, block: int, dim: int, num_warps: int, num_stages: int = 2, offset: int = 0
) -> None:
    q = torch.empty(16, dim, dtype=torch.float16, device=device)
    k = torch.empty(n * dim + offset, dtype=torch.float16, device=device)[offset:]
    out = torch.empty(16, dim, device=device)
    launch(
        attend, (1,), num_warps=num_warps, num_stages=num_stages, q=q, k=Rows(k, dim), out=out, n=n,
        scale=0.5, unused=None, N=block, SHAPE=Shape(16, dim),
    )  # fmt: skip


def toys() -> Iterator[tuple[str, Launch]]:
    """Named launches: sound ones first."""
    with recorded() as launches:
        launch_attend("meta", 4096, 64, 128, 4)
        launch_attend("meta", 8192, 64, 128, 4)  # the same code
        launch(add, (4,), num_warps=4, x=meta(1000), out=meta(1000), n=1000, SIZE=256)
        launch_attend("meta", 4096, 256, 256, 1, 1)
        launch_attend("meta", 4096, 128, 256, 4, 6)
        launch(wrong, (1,), num_warps=1, x=meta(64), SIZE=64)
        launch_attend("meta", 4096, 64, 128, 4, 1)
        launch_attend("meta", 4096, 64, 128, 4, 3)
        words = meta(64, dtype=torch.int64)
        launch(chase, (1,), num_warps=1, x=words, out=words, n=1000)
    names = (
        "sound", "sound again", "no loop", "spilling", "too much shared memory", "wrong",
        "not prefetched", "prefetched by two", "chain",
    )  # fmt: skip
    yield from zip(names, launches, strict=True)


class _NoGpu:
    """As much of a driver as Triton's JIT asks for before it compiles."""

    def get_current_target(self) -> object:
        return target_of(ARCH)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def specialisations() -> list[dict[str, Any]]:
    """What Triton's JIT compiles for tensors of the CPU, and what is derived from meta tensors."""
    arguments: list[dict[str, int]] = [
        {"n": 4096, "block": 64, "dim": 128, "num_warps": 4},
        {"n": 4095, "block": 32, "dim": 64, "num_warps": 2, "num_stages": 3},
        {"n": 1, "block": 16, "dim": 16, "num_warps": 1},
        {"n": 160, "block": 16, "dim": 16, "num_warps": 1, "offset": 8},
        {"n": 160, "block": 16, "dim": 16, "num_warps": 1, "offset": 3},
    ]
    rows = []
    for chosen in arguments:
        asked: dict[str, Any] = {}

        def note(asked: dict[str, Any] = asked, **seen: Any) -> bool:
            asked.update(seen["compile"])
            return True  # nothing is to be compiled

        driver.set_active(_NoGpu())
        jit.serialize_specialization_data = lambda *_: ""  # for hooks; it cannot write dataclasses
        knobs.runtime.jit_cache_hook = note
        launch_attend("cpu", **chosen)
        knobs.runtime.jit_cache_hook = None
        with recorded() as launches:
            launch_attend("meta", **chosen)
        made = specialise(launches[0], target_of(ARCH))
        theirs = (asked["signature"], asked["constants"], asked["configs"][0])
        ours = (made.signature, made.constants, made.attributes)
        options = {x: asked[x] == made.options[x] for x in ("num_warps", "num_stages", "num_ctas")}
        rows.append({"jit": repr(theirs), "ours": repr(ours), "options": options})
    return rows


def main() -> None:
    """Print what the test asserts."""
    jobs = [Job(toy, ARCH) for toy in distinct(toys(), target_of(ARCH))]
    results, _ = compile_all(jobs, 2)
    first = {r.fingerprint for r in results[:1]}
    again, seen = compile_all(jobs[:2], 1, skip=first)
    print(
        json.dumps(
            {
                "results": as_json(results),
                "problems": problems(results),
                "again": [r.cases[0] for r in again],
                "seen": seen,
                "tables": tables(results),
                "specialisations": specialisations(),
            }
        )
    )


if __name__ == "__main__":
    main()
