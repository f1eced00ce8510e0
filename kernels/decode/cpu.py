# SPDX-License-Identifier: Apache-2.0
"""Binding of cpu.cpp: the compiled kernels, or None where there is no compiler."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, layout_words, pointer, threads
from sglang_diffxkv.kernels.cpu.build import load_library
from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.kernels.merge import AttentionState

LOG2_E = math.log2(math.e)

_P, _I = ctypes.c_void_p, ctypes.c_int64
_SEALED = (_P, _I, _I, _P, _P, _I, _P, _I, _P, _P, _P, _I, _P, _P, _I)
_OPEN = (_P, _I, _I, _I, _I, _P, _P, _I, _I, _P, _P, _P, _P, _P, _I)


class DecodeKernels:
    """The functions of cpu.cpp; arguments as in :mod:`sglang_diffxkv.kernels.decode`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._sealed, self._open = library.diffxkv_decode_sealed, library.diffxkv_decode_open
        self._sealed.argtypes, self._open.argtypes = _SEALED, _OPEN
        self._sealed.restype = self._open.restype = None

    def decode_sealed(
        self,
        q: torch.Tensor,
        arena: torch.Tensor,
        frames: torch.Tensor,
        heads: torch.Tensor,
        indptr: torch.Tensor,
        pages: torch.Tensor,
        layout: PageLayout,
        sm_scale: float,
    ) -> AttentionState:
        scaled, part = _scaled(q, sm_scale), _empty_part(q)
        self._sealed(
            pointer(scaled),
            q.shape[0],
            q.shape[1] // layout.num_kv_heads,
            pointer(arena),
            pointer(frames),
            frames.stride(0),
            pointer(heads),
            heads.stride(0),
            pointer(indptr),
            pointer(pages),
            layout_words(layout),
            DTYPE_CODES[q.dtype],
            pointer(part.out),
            pointer(part.lse),
            threads(),
        )
        return part

    def decode_open(
        self,
        q: torch.Tensor,
        k_raw: torch.Tensor,
        v_raw: torch.Tensor,
        indptr: torch.Tensor,
        slots: torch.Tensor,
        last_len: torch.Tensor,
        sm_scale: float,
    ) -> AttentionState:
        scaled, part = _scaled(q, sm_scale), _empty_part(q)
        kv_heads, dim = k_raw.shape[2:]
        self._open(
            pointer(scaled),
            q.shape[0],
            q.shape[1] // kv_heads,
            kv_heads,
            dim,
            pointer(k_raw),
            pointer(v_raw),
            k_raw.stride(0),
            DTYPE_CODES[k_raw.dtype],
            pointer(indptr),
            pointer(slots),
            pointer(last_len),
            pointer(part.out),
            pointer(part.lse),
            threads(),
        )
        return part


def _scaled(q: torch.Tensor, sm_scale: float) -> torch.Tensor:
    return (q.float() * (sm_scale * LOG2_E)).contiguous()


def _empty_part(q: torch.Tensor) -> AttentionState:
    return AttentionState(
        torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:2], dtype=torch.float32)
    )


@functools.cache
def _bind(library: ctypes.CDLL) -> DecodeKernels:
    return DecodeKernels(library)


def kernels() -> DecodeKernels | None:
    """The compiled kernels for the instruction set in use; None without a compiler."""
    library = load_library("decode")
    return None if library is None else _bind(library)
