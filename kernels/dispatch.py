# SPDX-License-Identifier: Apache-2.0
"""Operations that have one implementation for each kind of device."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Generic, Literal, ParamSpec, TypeVar

import torch

from sglang_diffxkv.kernels.gpu.device import on_gpu

P = ParamSpec("P")
R = TypeVar("R")
Device = Literal["gpu", "cpu"]

_MODULES: dict[Device, str] = {"gpu": "triton", "cpu": "cpu"}
"""Modules beside an operation that its implementations register from when they are imported: on
first use, as machines without a GPU may lack Triton."""


class Operation(Generic[P, R]):
    """A function whose body checks its arguments and calls `on` a tensor's device.

    It is the one place for the signature, which implementations are typed by, and for its
    documentation::

        @operation
        def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
            '''x times factor; x is contiguous.'''
            return scale.on(x)(x, factor)

        @scale.register("cpu")  # in cpu.py beside it
        def _scale(x: torch.Tensor, factor: float) -> torch.Tensor: ...
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = function
        self._implementations: dict[Device, Callable[P, R]] = {}
        self.__doc__, self.__name__ = function.__doc__, function.__name__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*args, **kwargs)

    def register(self, device: Device) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorates the implementation for that kind of device."""

        def decorate(implementation: Callable[P, R]) -> Callable[P, R]:
            self._implementations[device] = implementation
            return implementation

        return decorate

    def on(self, tensor: torch.Tensor) -> Callable[P, R]:
        """The implementation for the device that ``tensor`` is on."""
        device: Device = "gpu" if on_gpu(tensor) else "cpu"
        if device not in self._implementations:
            import_module(f"{self._function.__module__}.{_MODULES[device]}")
        return self._implementations[device]


def operation(function: Callable[P, R]) -> Operation[P, R]:
    """Decorates the one function that callers know of an operation; see `Operation`."""
    return Operation(function)
