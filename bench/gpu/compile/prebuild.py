# SPDX-License-Identifier: Apache-2.0
"""Compiles what will be checked and timed into Triton's cache: one compilation takes seconds.

    TRITON_CACHE_DIR=FOLDER python -m bench.gpu.compile.prebuild 90 --processes 2    # needs no GPU

A cache made elsewhere is used where Triton and the kernels are byte for byte the same: the key of
an entry is made of both. `run` tells how many entries were.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from bench.gpu.compile.cases import cases
from bench.gpu.compile.meta import decode_launches
from bench.gpu.compile.settings import SETTINGS
from bench.gpu.compile.specialise import Configuration, distinct, specialise
from bench.gpu.remote.shim import kernels as shim
from bench.gpu.shapes import LLAMA_8B, LLAMA_70B, QWEN_7B
from bench.gpu.timing.sweep import grid, overridden
from sglang_diffxkv.kernels.gpu.device import assumed_capability
from sglang_diffxkv.kernels.gpu.launch import Launch, recorded


class Compiled(NamedTuple):
    """Attributes:
    hit: whether it was in the cache.
    error: what failed.
    """

    hit: bool
    error: str | None = None


def launches() -> Iterator[tuple[str, Launch]]:
    """All that the timing of decode will launch, then the other operations, with a name."""
    for model in (LLAMA_8B, QWEN_7B, LLAMA_70B):
        for launch in decode_launches(model, 64, 128):
            yield model.name, launch
    for constants in grid():
        with overridden(constants):
            made = decode_launches(LLAMA_8B, 64, 128)
        for launch in made:
            yield constants.name, launch
    yield from ((name, launch) for name, launch in cases() if name.endswith(SETTINGS[0].name))
    yield from (("shim", launch) for launch in shim_launches())


def shim_launches(tokens: int = 64) -> list[Launch]:
    """Of the kernels that stand in for SGLang's, with the model of the servers' bench."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    model = LLAMA_8B
    q_size, kv_size = model.heads * model.dim, model.kv_heads * model.dim
    x, weight = empty(tokens, model.hidden), empty(model.hidden)
    q, k, v = empty(tokens, q_size + 2 * kv_size).split([q_size, kv_size, kv_size], 1)
    heads = (part.view(tokens, -1, model.dim) for part in (q, k))
    cos_sin, cache = empty(9, model.dim, dtype=torch.float32), empty(9, kv_size)
    where = empty(tokens, dtype=torch.int64)
    with recorded() as made:
        shim.rmsnorm(x, weight)
        shim.fused_add_rmsnorm(x, x, weight)
        shim.silu_and_mul(empty(tokens, 2 * model.inner))
        shim.apply_rope_with_cos_sin_cache_inplace(*heads, cos_sin, where, is_neox=True)
        shim.store_cache(k, v, cache, cache, where)
    return made


def run(capability: int, processes: int | None = None) -> Iterator[dict[str, Any]]:
    """Compile everything; one record at the end.

    Args:
        capability: of the GPU, such as 90.
        processes: one per core unless given.
    """
    begin, target = time.monotonic(), GPUTarget("cuda", capability, 32)
    with assumed_capability(capability):
        configurations = list(distinct(launches(), target))
    fork = multiprocessing.get_context("fork")
    workers = processes or os.cpu_count()
    with ProcessPoolExecutor(workers, fork, _inherit, (configurations, target)) as pool:
        done = list(pool.map(_compile, range(len(configurations))))
    yield {
        "compiled": len(done),
        "in_cache": sum(x.hit for x in done),
        "seconds": round(time.monotonic() - begin, 1),
        "errors": [x.error for x in done if x.error],
    }


_configurations: Sequence[Configuration] = ()
_target: GPUTarget | None = None
_hits: list[bool] = []


def _inherit(configurations: Sequence[Configuration], target: GPUTarget) -> None:
    global _configurations, _target
    _configurations, _target = configurations, target
    knobs.compilation.listener = lambda *, cache_hit, **_: _hits.append(cache_hit)


def _compile(index: int) -> Compiled:
    configuration = _configurations[index]
    made = specialise(configuration.launch, _target)
    try:
        triton.compile(made.source, target=_target, options=made.options)
    except Exception as error:  # it fails again, and is told of, where it is used
        return Compiled(False, f"{configuration.cases[0]}: {type(error).__name__}")
    return Compiled(_hits[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, help="of the GPU, such as 90")
    parser.add_argument("--processes", type=int, help="default: one per core")
    options = parser.parse_args()
    for record in run(options.capability, options.processes):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
