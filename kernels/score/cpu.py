# SPDX-License-Identifier: Apache-2.0
"""Binding of cpu.cpp."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch

from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, pointer, threads
from sglang_diffxkv.kernels.cpu.build import load_library

LOG2_E = math.log2(math.e)
LIBRARY = "score", (Path(__file__).with_name("cpu.cpp"),)
"""Its name and sources."""

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_SCORE = (_P, _I, _F, _P, _P, _P, _I, _I, _I, _I, _P, _I, _I, _P, _P, _P, _P, _I, _I)


class ScoreKernel:
    """The function of cpu.cpp; arguments as in :mod:`sglang_diffxkv.kernels.score`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._score = library.diffxkv_score_open
        self._score.argtypes, self._score.restype = _SCORE, None

    def score_open(
        self,
        q: torch.Tensor,
        lse: torch.Tensor,
        q_indptr: torch.Tensor,
        q_position: torch.Tensor,
        k_raw: torch.Tensor,
        indptr: torch.Tensor,
        slots: torch.Tensor,
        page_position: torch.Tensor,
        accum: torch.Tensor,
        sm_scale: float,
    ) -> None:
        q = q.contiguous()
        kv_heads, dim = k_raw.shape[2:]
        self._score(
            pointer(q),
            DTYPE_CODES[q.dtype],
            sm_scale * LOG2_E,
            pointer(lse),
            pointer(q_indptr),
            pointer(q_position),
            len(indptr) - 1,
            q.shape[1] // kv_heads,
            kv_heads,
            dim,
            pointer(k_raw),
            k_raw.stride(0),
            DTYPE_CODES[k_raw.dtype],
            pointer(indptr),
            pointer(slots),
            pointer(page_position),
            pointer(accum),
            accum.stride(0),
            threads(),
        )


@functools.cache
def _bind(library: ctypes.CDLL) -> ScoreKernel:
    return ScoreKernel(library)


def kernel() -> ScoreKernel:
    """The compiled kernel for the instruction set in use."""
    return _bind(load_library(*LIBRARY))
