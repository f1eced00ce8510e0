# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter (3.8) without what it does over and over, which is half of its time.

Before a kernel runs it replaces the functions of `triton.language`. In each call of a function by
the kernel it goes through all of them again, and finds none left; and whenever it looks up a dtype
it makes a table of all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Nothing that kernels compute changes."""
    replace = interpreter._patch_lang
    known = cache(interpreter._get_np_dtype)

    def replace_where_needed(fn: Callable[..., Any]) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(fn)):
            return replace(fn)
        return interpreter._LangPatchScope()

    def np_dtype(kind: Any) -> np.dtype[Any]:
        scalar = kind.scalar
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else known(scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = replace_where_needed, np_dtype


@cache
def languages(fn: Callable[..., Any]) -> list[ModuleType]:
    """The modules of it that a function of a kernel sees."""
    return [value for value in fn.__globals__.values() if value is tl or value is tl.core]
