# SPDX-License-Identifier: Apache-2.0
"""Launching Triton kernels, or recording what would be launched.

Every Triton kernel of this package is launched here. Recorded launches (on meta tensors) are what
`make compile-kernels` compiles for GPUs that are not there, so that it compiles just what is
shipped, with the options that it is shipped with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One launch: a `triton.jit` function, its grid, and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


_recording: ContextVar[list[Launch] | None] = ContextVar("recording", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within this context nothing is launched; the list receives what would have been."""
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int,
    num_stages: int = 1,
    maxnreg: int | None = None,
    **arguments: Any,
) -> None:
    """Run ``kernel`` on the current stream, or record it.

    Args:
        kernel: a `triton.jit` function.
        grid: one to three dimensions; nothing is launched where one of them is 0.
        maxnreg: most registers per thread; unset, the assembler may rather spill than use more.
        arguments: all of the kernel's arguments, constants included, by name; `gpu.views` are
            passed whole.
    """
    if 0 in grid:
        return
    launches = _recording.get()
    if launches is not None:
        launches.append(Launch(kernel, grid, arguments, num_warps, num_stages, maxnreg))
        return
    if any(x.is_meta for x in _tensors(arguments.values())):
        raise RuntimeError("a kernel on meta tensors can only be recorded: use `recorded()`")
    options = {} if maxnreg is None else {"maxnreg": maxnreg}
    kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, **options)


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)
