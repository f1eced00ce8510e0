# SPDX-License-Identifier: Apache-2.0
"""What Triton would compile for a launch, told by Triton's own code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sglang_diffxkv.kernels.gpu.launch import Launch


class Specialisation(NamedTuple):
    """The source and the options of one compilation, as Triton has them."""

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    @property
    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)

    @property
    def named_types(self) -> dict[str, str]:
        """Triton's types by the names of arguments and, behind a dot, of their fields."""
        return dict(_flat(self.signature.items()))

    @property
    def named_constants(self) -> dict[str, Any]:
        """Constants by name: those that are declared, None, and integers that happen to be 1."""
        names = {path: name for name, path in _paths(self.signature)}
        return dict(_flat((names[path], value) for path, value in self.constants.items()))


def _flat(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Names and values, with those of each field where a value has fields."""
    for name, x in values:
        if is_dataclass(x):
            yield from _flat((f"{name}.{f.name}", getattr(x, f.name)) for f in fields(x))
        elif isinstance(x, tuple):
            yield from _flat((f"{name}.{n}", y) for n, y in _items(x))
        else:
            yield name, x


def _paths(signature: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and numbers of arguments and of their fields."""
    found = [(name, (i,), x) for i, (name, x) in enumerate(signature.items())]
    while found:
        name, path, x = found.pop()
        yield name, path
        if isinstance(x, tuple):
            found += [(f"{name}.{n}", (*path, i), y) for i, (n, y) in enumerate(_items(x))]


def _items(x: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    return zip(getattr(x, "_fields", map(str, range(len(x)))), x, strict=True)


class Configuration(NamedTuple):
    """A launch that is compiled, and the names of all cases that come down to the same code."""

    launch: Launch
    cases: list[str]


@dataclass(frozen=True)
class _Address:
    """Stands for a tensor on a GPU, whose allocator aligns storage to more than 16 bytes.

    No tuple: those Triton takes apart.
    """

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def _stand_in(value: Any) -> Any:
    """A meta tensor's address is 0 whatever its offset; those in NamedTuples, too."""
    if isinstance(value, torch.Tensor):
        return _Address(value.dtype, value.storage_offset() * value.itemsize)
    return type(value)(*map(_stand_in, value)) if isinstance(value, tuple) else value


def specialise(launch: Launch, target: GPUTarget) -> Specialisation:
    """What ``launch`` would compile on a GPU; its tensors may be meta tensors.

    Raises:
        TypeError: the kernel was made for Triton's interpreter.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel} is no JITFunction: TRITON_INTERPRET must not be set")
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {name: _stand_in(value) for name, value in launch.arguments.items()} | {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "debug": kernel.debug or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    if launch.maxnreg is not None:
        keywords["maxnreg"] = launch.maxnreg
    bound, specialization, options = bind(**keywords)
    packed = kernel._pack_args(backend, keywords, bound, specialization, options)
    options, signature, constants, attributes = packed
    return Specialisation(kernel, signature, constants, attributes, options.__dict__)


def distinct(launches: Iterable[tuple[str, Launch]], target: GPUTarget) -> Iterator[Configuration]:
    """One configuration for all launches that Triton compiles to the same code.

    Args:
        launches: with the name of the case that made each.
        target: any; what differs between launches does so on every target.
    """
    found: dict[str, Configuration] = {}
    for case, launch in launches:
        made = specialise(launch, target)
        key = f"{made.source.hash()} {launch.num_warps} {launch.num_stages} {launch.maxnreg}"
        cases = found.setdefault(key, Configuration(launch, [])).cases
        if case not in cases:
            cases.append(case)
    yield from found.values()
