# SPDX-License-Identifier: Apache-2.0
"""A GPU that is none: its tensors lie on the host, but torch takes them for CUDA's.

What runs on it is what runs on a GPU, with kernels in Triton's interpreter, and Python's bindings
do what they do for CUDA tensors. An operation that mixes host and device raises, and so does a copy
to the device that our own code waits for, if only of a number that is assigned to an element. What
else a GPU would make the host wait for is noted. Of streams see `fake_streams`.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from sglang_diffxkv import kernels
from sglang_diffxkv.kernels.basis.rotation import hadamard
from sglang_diffxkv.kernels.extend import flashinfer
from sglang_diffxkv.kernels.gpu import launch
from sglang_diffxkv.policy.budgeting import caps
from tests.support import fake_streams
from tests.support.fake_streams import Event, Stream

DEVICE = "cuda"
_CACHES = (hadamard, caps._size_table)
"""Of tensors by device."""
_COPY, _MOVE = "aten::copy_", "aten::_to_copy"
_WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::bincount",
)
"""Their results, or the shapes of these, are for the host; so are those of all unique ones."""
_UNIQUE, _REPEAT = "unique", "aten::repeat_interleave"
_ROOT = Path(launch.__file__).resolve().parents[2]
_FAKES = (__file__, fake_streams.__file__)
_INDEXES = ("aten::index", "aten::index_put_", "aten::index_put")
_waits: list[str] = []
_pinned: list[torch.Tensor] = []
"""Kept, so that no other memory comes to lie there."""
_registered: list[range] = []
"""Addresses that were pinned in place."""


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

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)
        stream.used.add(self.host.untyped_storage().data_ptr())

    def __repr__(self) -> str:
        return f"OnDevice({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Those that would ask the driver before any operation is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory:
            return _pin(args[0].clone())
        if kwargs.pop("pin_memory", False):
            return _pin(func(*args, **kwargs))
        if func is torch.tensor and kwargs.get("device") is not None:
            target = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(target)
        return func(*args, **kwargs)


def _pin(host: torch.Tensor) -> torch.Tensor:
    _pinned.append(host)
    return host


def _register(address: int, nbytes: int, flags: int) -> int:
    """`cudaHostRegister`."""
    _registered.append(range(address, address + nbytes))
    return 0


def _is_pinned(host: torch.Tensor) -> bool:
    address = host.data_ptr()
    return any(address == other.data_ptr() for other in _pinned) or any(
        address in memory for memory in _registered
    )


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the host, after a look at where its tensors are said to be."""
    name = func._schema.name
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    target = kwargs.get("device")
    if target is None:
        on_device = any(isinstance(x, OnDevice) for x in given)
    else:
        on_device = torch.device(target).type == DEVICE
    if name == _COPY:
        blocking = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
        _check_copy(args[1], isinstance(args[0], OnDevice), args[0], blocking)
    elif name == _MOVE:
        _check_copy(args[0], on_device, None, not kwargs.get("non_blocking"))
    else:
        _check_operands(name, given)
        waits_for = _makes_the_host_wait(name, args, kwargs)
        if isinstance(next(iter(given), None), OnDevice) and waits_for:
            _note_wait(name)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if func._schema.is_mutable:
        return kwargs.get("out", args[0] if args else None)
    return tree_map(_on_device, out) if on_device else out


def _check_copy(
    source: torch.Tensor, to_device: bool, target: torch.Tensor | None, blocking: bool
) -> None:
    if isinstance(source, OnDevice) == to_device:
        return
    host = source if to_device else target
    if not blocking and host is not None and _is_pinned(host):
        return
    if not to_device:
        _note_wait("download")
    elif _is_ours(_caller()):
        raise RuntimeError("a copy to the device that waits for it: see kernels.gpu.transfer")


def _check_operands(name: str, given: list[torch.Tensor]) -> None:
    hosts = [x for x in given if not isinstance(x, OnDevice)]
    if hosts and len(hosts) < len(given) and _is_ours(_caller()):
        raise RuntimeError(f"{name}: a tensor of the host, {tuple(hosts[0].shape)}, and the device")


def _makes_the_host_wait(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """As CUDA has it: values are asked for, or a shape depends on some."""
    if name == _REPEAT:
        return kwargs.get("output_size") is None
    if name in _INDEXES:
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        return any(x.dtype == torch.bool for x in indices)
    return name in _WAITS or _UNIQUE in name


def _caller() -> traceback.FrameSummary:
    """Who called torch."""
    stack = [x for x in traceback.extract_stack() if "/torch/" not in x.filename]
    return next(x for x in reversed(stack) if x.filename not in _FAKES)


def _is_ours(caller: traceback.FrameSummary) -> bool:
    path = Path(caller.filename).resolve()
    ours = ("sglang_diffxkv", "kernels", "patches")
    return any(path.is_relative_to(_ROOT / folder) for folder in ours)


def _note_wait(name: str) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # plans are solved in a thread that may wait
    caller = _caller()
    _waits.append(f"{name} in {Path(caller.filename).name}:{caller.lineno}, {caller.name}")


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
    """`launch.launch`, of tensors of the device, or pinned ones of the host."""
    for name, x in arguments.items():
        tensors = [y for y in tree_leaves(x) if isinstance(y, torch.Tensor)]
        if any(not isinstance(y, OnDevice) and not _is_pinned(y) for y in tensors):
            raise RuntimeError(f"{kernel}: {name} has a tensor of the host")
    hosts = tree_map(_host, arguments)

    def work() -> None:
        with _disable_current_modes():
            launch.launch(kernel, grid, **hosts)

    fake_streams.run_or_put_off(work)


@cache
def _launching() -> list[ModuleType]:
    """Modules that launch kernels."""
    found = pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    modules = [importlib.import_module(x.name) for x in found]
    return [x for x in modules if x is not launch and getattr(x, "launch", None) is launch.launch]


@contextmanager
def fake_device() -> Iterator[None]:
    """Within this context tensors may be made on `DEVICE`, and kernels run on them."""
    torch._C._ensureCUDADeviceGuardSet()  # as torch does for its own fake tensors
    properties, modules = SimpleNamespace(multi_processor_count=1), _launching()
    with pytest.MonkeyPatch.context() as patch, _Calls(), _Operations():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", fake_streams.stream)
        patch.setattr(torch.cuda, "current_stream", fake_streams.current_stream)
        patch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=_register))
        patch.setattr(fake_streams, "note_wait", _note_wait)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(flashinfer, "supports", lambda q, softmax: False)
        for module in modules:
            patch.setattr(module, "launch", _launch)
        _reset()
        yield
        _reset()


def _reset() -> None:
    fake_streams.reset()
    _pinned.clear()
    _registered.clear()
    for table in _CACHES:
        table.cache_clear()
