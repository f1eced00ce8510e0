# SPDX-License-Identifier: Apache-2.0
"""Lets SGLang be imported, and serve a dense Llama on a GPU, where packages of its are missing.

Absent packages are stood in for: their names can be imported, but not used. What a dense Llama does
use, of ``sgl_kernel`` and of the kernels that SGLang compiles itself, is in `shim.kernels`. Where
``sgl_kernel`` is installed, everything stays as it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from bench.gpu.remote.shim import syncs

ABSENT = ("sgl_kernel", "IPython", "soundfile")
KERNELS = "bench.gpu.remote.shim.kernels"
REPLACED = {
    "sgl_kernel": ("rmsnorm", "fused_add_rmsnorm", "silu_and_mul", "weak_ref_tensor"),
    "sgl_kernel.utils": ("is_arch_support_pdl",),
    "sglang.kernels.ops.activation.activation": ("silu_and_mul",),
    "sglang.kernels.ops.attention.rope": ("apply_rope_with_cos_sin_cache_inplace",),
    "sglang.kernels.ops.attention.clamp_position": ("clamp_position_cuda",),
    "sglang.kernels.ops.kvcache.kvcache": ("can_use_store_cache", "store_cache"),
}
"""Names of `KERNELS` by the module that they take the place in."""

SCHEDULER = "sglang.srt.managers.scheduler"
"""The module whose decode steps `syncs` watches."""


class StandIn:
    """Anything of an absent package: can be named, annotated with and inherited from."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.__name__} is called, and there is no such package here")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)

    def __instancecheck__(self, _: object) -> bool:
        return False

    def __or__(self, other: Any) -> Any:
        return other

    __ror__ = __or__


class _Absent(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return "0.0.0"
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")


class _AbsentLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        _replace(module)


class _ReplacingLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _replace(module)


def _replace(module: ModuleType) -> None:
    names = REPLACED.get(module.__name__, ())
    if names:
        kernels = importlib.import_module(KERNELS)
        module.__dict__.update({name: getattr(kernels, name) for name in names})
    if module.__name__ == SCHEDULER:
        syncs.install(module.Scheduler)


class Finder(MetaPathFinder):
    """Of absent packages, and of modules in which something is changed."""

    def __init__(self) -> None:
        self.absent = [name for name in ABSENT if PathFinder.find_spec(name) is None]

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in self.absent:
            return ModuleSpec(name, _AbsentLoader(), is_package=True)
        is_replaced = name in REPLACED and "sgl_kernel" in self.absent
        if not is_replaced and name != SCHEDULER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _ReplacingLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """From now on; before SGLang is imported."""
    sys.meta_path.insert(0, Finder())
