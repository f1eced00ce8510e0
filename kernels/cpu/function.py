# SPDX-License-Identifier: Apache-2.0
"""Functions of the C++ kernels, whose types Python reads from their declarations."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

from sglang_diffxkv.kernels.cpu.build import load_library, sources_of

_DECLARATION = re.compile(r'^extern "C" (\w+) (\w+)\(([^)]*)\) {', re.MULTILINE)
_TYPES = {
    "void": None,
    "bool": ctypes.c_bool,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class CFunction:
    """``extern "C"`` function of an operation's kernels; compiled and loaded when it is called.

    Pointers are passed as addresses (``tensor.data_ptr()``), `ctypes` arrays or None.

    Args:
        operation: the folder of its C++ files.
        name: as it is declared there.
    """

    def __init__(self, operation: str, name: str) -> None:
        self._operation, self._name = operation, name
        self._bound: Callable[..., Any] | None = None
        _functions.append(self)

    def __call__(self, *args: Any) -> Any:
        """Call it, of the instruction set that was in use at the first call.

        Raises:
            CompilerError: as `load_library`, at the first call.
        """
        if self._bound is None:
            self._bound = self._bind()
        return self._bound(*args)

    def unbind(self) -> None:
        """Have the next call be a first one."""
        self._bound = None

    def _bind(self) -> Callable[..., Any]:
        function = load_library(self._operation)[self._name]
        function.restype, *function.argtypes = self._declared()
        return function

    def _declared(self) -> list[Any]:
        """Types of what it returns, and of its arguments."""
        for source in sources_of(self._operation):
            for returned, name, arguments in _DECLARATION.findall(source.read_text()):
                if name == self._name:
                    return [_TYPES[returned], *(_type_of(x) for x in arguments.split(","))]
        raise LookupError(f"no function {self._name} in {self._operation}")


_functions: list[CFunction] = []


def unbind_all() -> None:
    """For whoever has changed the instruction set that the environment forces."""
    for function in _functions:
        function.unbind()


def _type_of(argument: str) -> Any:
    return ctypes.c_void_p if "*" in argument else _TYPES[argument.split()[0]]
