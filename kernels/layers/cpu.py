# SPDX-License-Identifier: Apache-2.0
"""Binding of cpu.cpp."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES
from sglang_diffxkv.kernels.cpu.build import load_library

LIBRARY = "layers", (Path(__file__).with_name("cpu.cpp"),)
"""Its name and sources."""

_P, _I, _F, _B = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_bool
_RMS_NORM = (_P, _P, _P, _P, _I, _I, _F, _I, _I)
_ROTARY = (_P, _I, _I, _I, _I, _I, _P, _P, _B, _I, _I)
_SILU = (_P, _P, _I, _I, _I, _I)


class LayerKernels:
    """The functions of cpu.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._rms_norm, self._rotary = library.diffxkv_rms_norm, library.diffxkv_rotary
        self._silu = library.diffxkv_silu_and_mul
        self._rms_norm.argtypes, self._rotary.argtypes = _RMS_NORM, _ROTARY
        self._silu.argtypes = _SILU
        self._rms_norm.restype = self._rotary.restype = self._silu.restype = None

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RMSNorm of x [..., D], or of the sum with ``residual``, which then becomes that sum.

        Args:
            x, residual, weight [D]: contiguous, fp32, bf16 or fp16, all of one dtype.

        Returns:
            Of x's shape and dtype.
        """
        out, dim = torch.empty_like(x), x.shape[-1]
        self._rms_norm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // dim,
            dim,
            eps,
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )
        return out

    def rotary(
        self, positions: torch.Tensor, x: torch.Tensor, dim: int, cache: torch.Tensor, neox: bool
    ) -> None:
        """Rotate heads x [T, H * D] in place at the first of their elements.

        Args:
            positions: int64 [T], contiguous. x: fp32, bf16 or fp16; tokens may be strided.
            dim: D.
            cache: [positions, R], as many elements of a head are rotated: cosines before sines; of
                x's dtype, contiguous.
            neox: whether pairs are the halves of those elements, not neighbours.
        """
        tokens, width = x.shape
        self._rotary(
            x.data_ptr(),
            x.stride(0),
            tokens,
            width // dim,
            dim,
            cache.shape[1],
            positions.data_ptr(),
            cache.data_ptr(),
            neox,
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """``silu(a) * b`` of contiguous x = [a, b], [T, 2 D] -> [T, D]; fp32, bf16 or fp16."""
        rows, dim = x.shape[0], x.shape[1] // 2
        out = x.new_empty(rows, dim)
        dtype = DTYPE_CODES[x.dtype]
        self._silu(x.data_ptr(), out.data_ptr(), rows, dim, dtype, torch.get_num_threads())
        return out


@functools.cache
def _bind(library: ctypes.CDLL) -> LayerKernels:
    return LayerKernels(library)


def kernels() -> LayerKernels:
    """The compiled kernels for the instruction set in use."""
    return _bind(load_library(*LIBRARY))
