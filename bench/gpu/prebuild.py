# SPDX-License-Identifier: Apache-2.0
"""Compiles what will be timed into Triton's cache, on all cores: one compilation takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench.gpu.shapes import LLAMA_8B, LLAMA_70B, QWEN_7B, TIERS, Model
from bench.gpu.specialise import Configuration, distinct, specialise
from bench.gpu.time_sweep import Constants, grid, overridden, shipped
from bench.gpu.verify import kernels
from sglang_diffxkv.kernels.decode.plan import SequencePages, plan_decode
from sglang_diffxkv.kernels.gpu.launch import Launch, recorded
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, make_layout

LAYERS = 5
"""Slices of layers are aligned differently, which Triton compiles kernels for."""


def decode_launches(model: Model, constants: Constants, batch: int, pages: int) -> list[Launch]:
    """What a decode step launches, on meta tensors."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    layout = make_layout(
        head_dim=model.dim,
        num_kv_heads=model.kv_heads,
        raw_itemsize=2,
        high=FORMATS[TIERS[0]],
        low=FORMATS[TIERS[1]],
    )
    total = batch * pages
    lists = ints(total), ints(batch), ints(batch), ints(total), ints(batch)
    raw_shape = LAYERS, 2 * batch, PAGE_TOKENS, model.kv_heads, model.dim
    raw = torch.empty(raw_shape, dtype=torch.bfloat16, device="meta")
    q = raw.new_empty(LAYERS, batch, model.heads, model.dim)
    arena = raw.new_empty(total, layout.frame_bytes, dtype=torch.uint8)
    frames, heads = ints(LAYERS, total, layout.max_frames), ints(LAYERS, total, model.kv_heads, 2)
    with overridden(constants), recorded() as launches:
        plan = plan_decode(SequencePages(*lists), heads, layout)
        for i in range(LAYERS):
            kernels("decode").attend(
                q[i], q[i], arena, frames[i], heads[i], raw[i], raw[i], plan.layer(i), layout, 1.0
            )
    return launches


def launches() -> Iterator[tuple[str, Launch]]:
    """All that the timing of decode will launch, with a name."""
    for model in (LLAMA_8B, QWEN_7B, LLAMA_70B):
        for launch in decode_launches(model, shipped(), 64, 128):
            yield model.name, launch
    for constants in grid():
        for launch in decode_launches(LLAMA_8B, constants, 64, 128):
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
