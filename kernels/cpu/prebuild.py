# SPDX-License-Identifier: Apache-2.0
"""Compiles and loads what a server needs before it says that it is ready."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from sglang_diffxkv.kernels.cpu.build import is_built, load_library
from sglang_diffxkv.kernels.decode.cpu import LIBRARY as DECODE
from sglang_diffxkv.kernels.extend.cpu import LIBRARY as EXTEND
from sglang_diffxkv.kernels.layers.cpu import LIBRARY as LAYERS
from sglang_diffxkv.kernels.pack.cpu import LIBRARY as PACK
from sglang_diffxkv.kernels.score.cpu import LIBRARY as SCORE
from sglang_diffxkv.kernels.step.cpu import LIBRARY as STEP

logger = logging.getLogger(__name__)


def load_all(*, scores: bool) -> None:
    """Load every library, so that no request waits for a compiler; several compile at a time.

    Args:
        scores: whether the policy grades tokens by their scores.

    Raises:
        CompilerError: as `load_library`.
    """
    libraries = [DECODE, EXTEND, LAYERS, PACK, STEP, *([SCORE] if scores else [])]
    begin, missing = time.monotonic(), [x for x in libraries if not is_built(*x)]
    with ThreadPoolExecutor(len(libraries)) as pool:
        list(pool.map(lambda library: load_library(*library), libraries))
    compiled = [name for name, sources in missing if is_built(name, sources)]
    if compiled:
        logger.info(
            "diffxkv: compiled C++ kernels (%s) in %.1f s; later starts find them in the cache",
            ", ".join(compiled),
            time.monotonic() - begin,
        )
