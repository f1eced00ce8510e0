# SPDX-License-Identifier: Apache-2.0
"""A device that is none: its tensors lie on the host, but whatever mixes the two raises.

What runs on it is what runs on a GPU, with kernels in Triton's interpreter. It calls itself "meta",
the one device that torch lets anybody make tensors of.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from sglang_diffxkv.kernels.gpu import device, launch
from sglang_diffxkv.kernels.rotation import hadamard
from sglang_diffxkv.policy import caps

DEVICE = "meta"
_LAUNCHING = [f"sglang_diffxkv.kernels.{x}.triton" for x in ("arena", "pack", "score", "step")]
_LAUNCHING += [f"sglang_diffxkv.kernels.{x}" for x in ("decode.plan", "decode.triton")]
_LAUNCHING += [f"sglang_diffxkv.kernels.extend.{x}" for x in ("triton", "unpacked")]
_CACHES = (hadamard, caps._size_table)
"""Of tensors by device."""
_MOVES = ("aten::copy_", "aten::_to_copy")
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
"""Their results, or the shapes of these, are for the host; so are those of all unique ones."""
_UNIQUE = "unique"
_waits: list[str] = []
_INDEXES = ("aten::index", "aten::index_put_", "aten::index_put")


class OnDevice(torch.Tensor):
    """A tensor of the device; `host` has its elements."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        made.host = host
        return made

    def tolist(self) -> Any:
        _note_wait("tolist")
        return self.host.tolist()

    def __repr__(self) -> str:
        return f"OnDevice({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """`torch.tensor` leaves tensors of "meta" without elements, before any operation is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            target = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(target)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the host, after a look at where its tensors are said to be."""
    name = func._schema.name
    _check(name, args, kwargs)
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    target = kwargs.get("device")
    waits_for = _makes_the_host_wait(name, args, kwargs)
    if target is None:
        on_device = any(isinstance(x, OnDevice) for x in given)
    else:
        on_device = torch.device(target).type == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if waits_for and any(isinstance(x, OnDevice) for x in given):
        _note_wait(name)
    out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if func._schema.is_mutable:
        return args[0]
    return tree_map(_on_device, out) if on_device else out


def _check(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name in _MOVES:
        return
    if name in _INDEXES and isinstance(args[0], OnDevice):
        args = (args[0], *args[2:])  # indices may be the host's
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    assert all(isinstance(x, OnDevice) or not x.is_meta for x in given), f"{name}: no elements"
    # Single elements of the host may meet any device.
    hosts = [x for x in given if not isinstance(x, OnDevice) and x.dim()]
    if hosts and any(isinstance(x, OnDevice) for x in given):
        raise RuntimeError(f"{name}: a tensor of the host, {tuple(hosts[0].shape)}, and the device")


def _makes_the_host_wait(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """As CUDA has it: values are asked for, or a shape depends on some."""
    if name in _MOVES:
        if name == "aten::copy_":
            return not isinstance(args[0], OnDevice)
        return torch.device(kwargs.get("device") or DEVICE).type == "cpu"
    if name in _INDEXES:
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        return any(x.dtype == torch.bool for x in indices)
    return name in _WAITS or _UNIQUE in name


def _note_wait(name: str) -> None:
    """With the line that it happens in, torch's own left out."""
    stack = [x for x in traceback.extract_stack() if "/torch/" not in x.filename]
    callers = [x for x in stack if x.filename != __file__]
    _waits.append(f"{name} in {Path(callers[-1].filename).name}:{callers[-1].lineno}")


@contextmanager
def waits() -> Iterator[list[str]]:
    """Within this context: the operations that would wait for a GPU, in order."""
    _waits.clear()
    yield _waits


def _host(x: Any) -> Any:
    return x.host if isinstance(x, OnDevice) else x


def _on_device(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) else x


def _launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """`launch.launch`, of tensors of the device only."""
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice):
            raise RuntimeError(f"{kernel}: {name} is a tensor of the host")
    with _disable_current_modes():
        launch.launch(kernel, grid, **{name: _host(x) for name, x in arguments.items()})


@contextmanager
def fake_device() -> Iterator[None]:
    """Within this context tensors may be made on `DEVICE`, and kernels run on them."""
    with pytest.MonkeyPatch.context() as patch, _Lists(), _Operations():
        patch.setitem(device.MULTIPROCESSORS, DEVICE, 1)
        for name in _LAUNCHING:
            patch.setattr(importlib.import_module(name), "launch", _launch)
        _clear_caches()
        yield
        _clear_caches()


def _clear_caches() -> None:
    for cache in _CACHES:
        cache.cache_clear()
