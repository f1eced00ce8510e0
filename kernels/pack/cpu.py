# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking in C++ (cpu.cpp); fp32 outputs only, for the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, layout_words, pointer, threads
from sglang_diffxkv.kernels.cpu.build import load_library
from sglang_diffxkv.kernels.layout import PageLayout

LIBRARY = "pack", (Path(__file__).with_name("cpu.cpp"),)
"""Its name and sources."""


def library() -> ctypes.CDLL:
    """The compiled kernels for the instruction set in use."""
    return load_library(*LIBRARY)


def pack(
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    slots: torch.Tensor,
    tiers: torch.Tensor,
    importance: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    arena: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Write the payload of S pages of one layer; arguments as in `pack.pack`."""
    lib = library()
    slots = slots.long().contiguous()
    tiers, importance = tiers.contiguous(), importance.contiguous()
    frames, heads = frames.contiguous(), heads.contiguous()
    lib.diffxkv_pack(
        layout_words(layout),
        threads(),
        pointer(k_raw),
        _strides(k_raw),
        pointer(v_raw),
        _strides(v_raw),
        ctypes.c_int64(DTYPE_CODES[k_raw.dtype]),
        ctypes.c_int64(k_raw.itemsize),
        pointer(slots),
        ctypes.c_int64(len(slots)),
        pointer(tiers),
        pointer(importance),
        pointer(frames),
        ctypes.c_int64(frames.shape[1]),
        pointer(heads),
        pointer(arena),
    )


def unpack_into(
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    pages: torch.Tensor,
    first: torch.Tensor,
    layout: PageLayout,
    raw_dtype: torch.dtype,
    k: torch.Tensor,
    v: torch.Tensor,
    notes: torch.Tensor | None = None,
) -> None:
    """Dequantise N pages into fp32 rows; arguments as in `pack.unpack_into`."""
    lib = library()
    pages, first = pages.long().contiguous(), first.contiguous()
    lib.diffxkv_unpack(
        layout_words(layout),
        threads(),
        pointer(arena),
        pointer(frames),
        ctypes.c_int64(frames.stride(0)),
        pointer(heads),
        ctypes.c_int64(heads.stride(0)),
        pointer(pages),
        ctypes.c_int64(len(pages)),
        pointer(first),
        ctypes.c_int64(DTYPE_CODES[raw_dtype]),
        pointer(k),
        pointer(v),
        ctypes.c_void_p(None) if notes is None else pointer(notes),
    )


def _strides(raw: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Strides of pages, tokens and heads in elements; elements of a row must be adjacent."""
    assert raw.stride(3) == 1
    return (ctypes.c_int64 * 3)(*raw.stride()[:3])
