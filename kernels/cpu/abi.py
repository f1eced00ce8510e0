# SPDX-License-Identifier: Apache-2.0
"""How tensors and layouts are handed to the C++ kernels: pointers and int64 words."""

from __future__ import annotations

import ctypes
import functools

import torch

from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.kernels.pages import SealedTables

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""``enum DType`` of rows.h."""


def table_words(tables: SealedTables) -> ctypes.Array[ctypes.c_int64]:
    """``struct SealedTables`` of payload.h.

    Raises:
        ValueError: a row of frames, or the records of a page, are not contiguous.
    """
    arena, frames, heads, layout = tables
    # Of one page: the stride of a dimension of size 1 may be anything.
    if not (frames[:1].is_contiguous() and heads[:1].is_contiguous()):
        raise ValueError(f"strides of frames {frames.stride()}, of heads {heads.stride()}")
    return int64_words(
        ctypes.addressof(layout_words(layout)),  # cached: it lives on
        arena.data_ptr(),
        frames.data_ptr(),
        frames.stride(0),
        heads.data_ptr(),
        heads.stride(0),
    )


@functools.cache
def layout_words(layout: PageLayout) -> ctypes.Array[ctypes.c_int64]:
    """``struct Layout`` of payload.h."""
    high, low = layout.high, layout.low
    words = (
        layout.head_dim,
        layout.num_kv_heads,
        layout.raw_itemsize,
        high.key_bits,
        high.value_bits,
        low.key_bits,
        low.value_bits,
        layout.frame_bytes,
        layout.max_frames,
        layout.align,
    )
    return int64_words(*words)


def int64_words(*words: int) -> ctypes.Array[ctypes.c_int64]:
    """A struct of C++ whose members are all of 64 bits: numbers and addresses."""
    return (ctypes.c_int64 * len(words))(*words)


def threads() -> int:
    """Threads a kernel may use: as many as torch does."""
    return torch.get_num_threads()
