# SPDX-License-Identifier: Apache-2.0
"""What the machine is, how fast its memory is, and whether fp16 subnormals survive a product."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any

import torch
import triton
import triton.language as tl

from bench.gpu.timing.timer import interleaved, l2_bytes
from sglang_diffxkv.kernels.gpu.device import multiprocessors
from sglang_diffxkv.kernels.gpu.launch import launch

SIZES = (64 << 20, 256 << 20, 1 << 30, 4 << 30)
"""Bytes of a buffer that is copied or read."""

PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "numpy")
BLOCK = 4096


@triton.jit
def _subnormal_kernel(codes, out, SIDE: tl.constexpr):
    """Products with codes read as fp16 subnormals, which is how all kernels read them."""
    row = tl.arange(0, SIDE)
    at = row[:, None] * SIDE + row[None, :]
    byte = tl.load(codes + at)
    half = byte.to(tl.uint16).to(tl.float16, bitcast=True)
    one = tl.where(row[:, None] == row[None, :], 1.0, 0.0).to(tl.float16)
    # Both operands in turn: the hardware might treat them differently.
    tl.store(out + at, tl.dot(half, one) * 2.0**24)
    tl.store(out + SIDE * SIDE + at, tl.dot(one, half) * 2.0**24)


@triton.jit
def _read_kernel(x, out, count, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """Sum of int32 words: reads everything, writes next to nothing."""
    total = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for at in range(first, count, BLOCK * PROGRAMS):
        index = at + tl.arange(0, BLOCK)
        total += tl.load(x + index, mask=index < count, other=0)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def subnormals(device: torch.device) -> dict[str, Any]:
    """Whether `tl.dot` multiplies every fp16 subnormal of a byte exactly, as either operand.

    Small products are warps' own on every GPU; large ones are a warp group's on Hopper.
    """
    found: dict[str, Any] = {}
    for name, side, num_warps in (("small", 16, 1), ("large", 64, 4)):
        codes = (torch.arange(side * side, device=device) % 256).to(torch.uint8).view(side, side)
        out = torch.full((2, side, side), torch.nan, device=device)
        launch(_subnormal_kernel, (1,), codes=codes, out=out, SIDE=side, num_warps=num_warps)
        found[name] = bool((out == codes.float()).all())
        found[f"{name} zeros"] = int((out[:, codes > 0] == 0).sum())
    return {"exact": found["small"] and found["large"]} | found


def facts(device: torch.device) -> dict[str, Any]:
    """Names and versions."""
    found: dict[str, Any] = {
        "device": "cpu, Triton's interpreter",
        "multiprocessors": multiprocessors(device),
        "l2_bytes": l2_bytes(device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": query("driver_version"),
        "clock": query("clocks.max.sm"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory_bytes"] = properties.total_memory
        found["capability"] = f"sm_{properties.major}{properties.minor}"
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"], found["triton"] = torch.__version__, triton.__version__
    return found


def _copy(sources: list[torch.Tensor], targets: list[torch.Tensor], i: int) -> None:
    targets[i].copy_(sources[i])


def _read(sources: list[torch.Tensor], out: torch.Tensor, i: int) -> None:
    x, programs = sources[i], len(out)
    constants = {"count": len(x), "BLOCK": BLOCK, "PROGRAMS": programs}
    launch(_read_kernel, (programs,), x=x, out=out, num_warps=8, **constants)


def bandwidths(device: torch.device) -> Iterator[dict[str, Any]]:
    """Bytes per second of copying (read and written bytes both count) and of reading alone."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 20
    for size in SIZES if device.type == "cuda" else (1 << 16,):
        copies = max(2, -(-4 * l2_bytes(device) // size))
        if 2.2 * copies * size > free:
            continue
        words = size // 4
        sources = [torch.ones(words, dtype=torch.int32, device=device) for _ in range(copies)]
        targets = [torch.empty_like(x) for x in sources]
        out = torch.zeros(multiprocessors(device) * 8, dtype=torch.int32, device=device)
        read, copy = partial(_read, sources, out), partial(_copy, sources, targets)
        timed = interleaved({"copy": copy, "read": read}, copies, device)
        assert int(out.sum()) == words
        yield {
            "size": size,
            "copy": 2 * size / timed["copy"].median,
            "read": size / timed["read"].median,
        }


def run(device: torch.device) -> Iterator[dict[str, Any]]:
    """What it is; then subnormals, as all else is in vain without them."""
    yield {"facts": facts(device)}
    yield {"subnormals": subnormals(device)}
    for entry in bandwidths(device):
        yield {"bandwidth": entry}


def query(what: str) -> str | None:
    """A value of nvidia-smi, where there is one."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None
