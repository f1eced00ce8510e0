# SPDX-License-Identifier: Apache-2.0
"""Compiles what will be timed into Triton's cache, on all cores: one compilation takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from bench.gpu.meta import decode_launches
from bench.gpu.shapes import LLAMA_8B, LLAMA_70B, QWEN_7B
from bench.gpu.specialise import Configuration, distinct, specialise
from bench.gpu.time_sweep import grid, overridden
from sglang_diffxkv.kernels.gpu.launch import Launch


def launches() -> Iterator[tuple[str, Launch]]:
    """All that the timing of decode will launch, with a name."""
    for model in (LLAMA_8B, QWEN_7B, LLAMA_70B):
        for launch in decode_launches(model, 64, 128):
            yield model.name, launch
    for constants in grid():
        with overridden(constants):
            made = decode_launches(LLAMA_8B, 64, 128)
        for launch in made:
            yield constants.name, launch


def run(capability: int) -> Iterator[dict[str, Any]]:
    """Compile everything; one record at the end.

    Args:
        capability: of the GPU, such as 90.
    """
    begin, target = time.monotonic(), GPUTarget("cuda", capability, 32)
    configurations = list(distinct(launches(), target))
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), fork, _inherit, (configurations, target)) as pool:
        errors = [x for x in pool.map(_compile, range(len(configurations))) if x]
    yield {
        "compiled": len(configurations),
        "seconds": round(time.monotonic() - begin, 1),
        "errors": errors,
    }


_configurations: Sequence[Configuration] = ()
_target: GPUTarget | None = None


def _inherit(configurations: Sequence[Configuration], target: GPUTarget) -> None:
    global _configurations, _target
    _configurations, _target = configurations, target


def _compile(index: int) -> str | None:
    configuration = _configurations[index]
    made = specialise(configuration.launch, _target)
    try:
        triton.compile(made.source, target=_target, options=made.options)
    except Exception as error:  # it fails again, and is told of, where it is used
        return f"{configuration.cases[0]}: {type(error).__name__}"
    return None
