# SPDX-License-Identifier: Apache-2.0
"""Compiles and loads what a server needs before it says that it is ready."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from sglang_diffxkv.kernels.cpu.build import is_built, load_library

logger = logging.getLogger(__name__)

OPERATIONS = ("decode", "extend", "layers", "pack", "step")
"""Those that every server on a CPU needs."""


def load_all(*, scores: bool) -> None:
    """Load every operation's kernels, several at a time, so that no request waits for a compiler.

    Args:
        scores: whether the policy grades tokens by their scores.

    Raises:
        CompilerError: as `load_library`.
    """
    needed = [*OPERATIONS, *(["score"] if scores else [])]
    begin, missing = time.monotonic(), [x for x in needed if not is_built(x)]
    with ThreadPoolExecutor(len(needed)) as pool:
        list(pool.map(load_library, needed))
    if missing:
        logger.info(
            "diffxkv: compiled C++ kernels (%s) in %.1f s; later starts find them in the cache",
            ", ".join(missing),
            time.monotonic() - begin,
        )
