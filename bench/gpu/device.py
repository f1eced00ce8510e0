# SPDX-License-Identifier: Apache-2.0
"""The device that is benched: its kernels, tensors on it, and whether it still works."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_map

from sglang_diffxkv.kernels.gpu.launch import is_interpreted


def chosen() -> torch.device:
    """The GPU, or the CPU where kernels run in Triton's interpreter."""
    return torch.device("cpu" if is_interpreted() else "cuda")


def kernels(operation: str) -> ModuleType:
    """The Triton launches of an operation: on a CPU its public functions would run C++ instead."""
    return importlib.import_module(f"sglang_diffxkv.kernels.{operation}.triton")


def to(device: torch.device, *values: Any) -> tuple[Any, ...]:
    """The same values with tensors, those in NamedTuples, too, on a device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, values)


class DeviceLost(RuntimeError):
    """The device reported an error that this process cannot get rid of."""


def check_device(device: torch.device) -> None:
    """Raise DeviceLost where nothing works any more."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(last_line(error)) from error


def last_line(error: BaseException) -> str:
    """Kind and last line of what was the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or ["?"]
    return f"{type(error).__name__}: {lines[-1][:300]}"
