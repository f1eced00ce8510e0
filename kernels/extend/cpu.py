# SPDX-License-Identifier: Apache-2.0
"""Extend in C++ (cpu.cpp), over sealed and open pages in one call."""

from __future__ import annotations

import ctypes

import torch

from sglang_diffxkv.kernels import extend as ops
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, layout_words, threads
from sglang_diffxkv.kernels.cpu.function import CFunction
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, unwritten_state
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedPages
from sglang_diffxkv.kernels.softmax import Softmax

_function = CFunction("extend", "diffxkv_extend")
_P, _I = ctypes.c_void_p, ctypes.c_int64


class QueryArgs(ctypes.Structure):
    """``struct Queries`` of query_tile.h."""

    _fields_ = (
        ("data", _P),
        ("token_stride", _I),
        ("dtype", _I),
        ("indptr", _P),
        ("batch", _I),
        ("kv_heads", _I),
        ("group", _I),
        ("dim", _I),
        ("scale", ctypes.c_double),
        ("cap", ctypes.c_double),
        ("window_left", _I),
        ("sinks", _P),
    )


class OpenArgs(ctypes.Structure):
    """``struct OpenPages`` of panel.h."""

    _fields_ = (
        ("key", _P),
        ("value", _P),
        ("page_stride", _I),
        ("dtype", _I),
        ("indptr", _P),
        ("slots", _P),
        ("page_position", _P),
        ("q_position", _P),
    )


class SealedArgs(ctypes.Structure):
    """``struct SealedPages`` of panel.h."""

    _fields_ = (
        ("layout", _P),
        ("arena", _P),
        ("frames", _P),
        ("heads", _P),
        ("frames_stride", _I),
        ("heads_stride", _I),
        ("indptr", _P),
        ("pages", _P),
        ("raw_dtype", _I),
        ("key_mean", _P),
    )


@ops.extend_sealed.register("cpu")
def extend_sealed(queries: Queries, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    return extend(queries, None, sealed, None, softmax.of_part)


@ops.extend_open.register("cpu")
def extend_open(queries: Queries, opened: OpenPages, softmax: Softmax) -> AttentionState:
    return extend(queries, opened, None, None, softmax.of_part)


def extend(
    queries: Queries,
    opened: OpenPages | None,
    sealed: SealedPages | None,
    key_mean: torch.Tensor | None,
    softmax: Softmax,
) -> AttentionState:
    """Attention over open and sealed pages, of which there is at least one kind.

    Args:
        opened: tiers of raw elements have their dtype; without them, that of the queries.
        key_mean: fp32 [H, D], which sealed keys lack; queries and output are then of the model's
            basis (`basis.sealed`), else of the sealed pages'. Zero where scores are capped: a cap
            is not linear.
        softmax: of the layer, sinks included.

    Raises:
        ValueError: a page of new tokens is not listed, or shapes and strides do not fit.
    """
    q, batch = queries.q, len(queries.indptr) - 1
    heads, dim = q.shape[1:]
    kv_heads = _kv_heads(opened, sealed)
    if heads % kv_heads or q.stride()[1:] != (dim, 1):
        raise ValueError(f"q {tuple(q.shape)}, strides {q.stride()}, for {kv_heads} KV heads")
    asked = QueryArgs(
        q.data_ptr(),
        q.stride(0),
        DTYPE_CODES[q.dtype],
        _integers(queries.indptr),
        batch,
        kv_heads,
        heads // kv_heads,
        dim,
        softmax.log2_scale,
        softmax.log2_cap,
        softmax.window_left,
        None if softmax.sinks is None else softmax.sinks.data_ptr(),
    )
    raw_dtype = q.dtype if opened is None else opened.keys.dtype
    turned = None if key_mean is None else rotate(key_mean).contiguous()
    state = unwritten_state(q)
    lacking = _function(
        ctypes.byref(asked),
        None if sealed is None else ctypes.byref(_sealed_args(sealed, turned, raw_dtype)),
        None if opened is None else ctypes.byref(_open_args(opened, queries.position)),
        state.out.data_ptr(),
        state.lse.data_ptr(),
        threads(),
    )
    if lacking >= 0:
        raise ValueError(f"open pages of sequence {lacking} lack new tokens")
    return state


def _open_args(opened: OpenPages, position: torch.Tensor) -> OpenArgs:
    k, v = opened.keys, opened.values
    inner = k.shape[2] * k.shape[3], k.shape[3], 1
    if k.stride()[1:] != inner or k.stride() != v.stride() or k.shape[1] != PAGE_TOKENS:
        raise ValueError(f"raw pages {tuple(k.shape)} with strides {k.stride()}, {v.stride()}")
    lists = opened.indptr, opened.slots, opened.position, position
    pointers = k.data_ptr(), v.data_ptr()
    return OpenArgs(*pointers, k.stride(0), DTYPE_CODES[k.dtype], *map(_integers, lists))


def _sealed_args(
    sealed: SealedPages, turned_mean: torch.Tensor | None, raw_dtype: torch.dtype
) -> SealedArgs:
    arena, frames, heads, layout, indptr, pages = sealed
    return SealedArgs(
        ctypes.addressof(layout_words(layout)),  # cached: it lives on
        arena.data_ptr(),
        frames.data_ptr(),
        heads.data_ptr(),
        frames.stride(0),
        heads.stride(0),
        _integers(indptr),
        _integers(pages),
        DTYPE_CODES[raw_dtype],
        None if turned_mean is None else turned_mean.data_ptr(),
    )


def _integers(x: torch.Tensor) -> int:
    """Address of a list."""
    if x.dtype != torch.int32 or not x.is_contiguous():
        raise ValueError(f"a list {tuple(x.shape)} of {x.dtype} with strides {x.stride()}")
    return x.data_ptr()


def _kv_heads(opened: OpenPages | None, sealed: SealedPages | None) -> int:
    if opened is not None:
        return opened.keys.shape[2]
    assert sealed is not None
    return sealed.layout.num_kv_heads
