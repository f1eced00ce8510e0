# SPDX-License-Identifier: Apache-2.0
"""Binding of cpu.cpp: the compiled kernel, or None where there is no compiler."""

from __future__ import annotations

import ctypes
import math

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, layout_words, threads
from sglang_diffxkv.kernels.cpu.build import load_library
from sglang_diffxkv.kernels.extend.lists import OpenList, PageList
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import SealedTables

LOG2_E = math.log2(math.e)

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


class Extend:
    """One step's attention of new tokens over sealed and open pages, for one layer at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        q_indptr: torch.Tensor,
        open_list: OpenList | None,
        sealed_list: PageList | None,
    ) -> None:
        """Note what all layers share.

        Args:
            q_indptr: int32 [B + 1], new tokens of each sequence.
            open_list, sealed_list: the pages; None: there are none of this kind.
        """
        self._extend = library.diffxkv_extend
        self._extend.argtypes, self._extend.restype = (_P, _P, _P, _P, _P, _I), _I
        self._kept: list[torch.Tensor] = []
        self._queries = QueryArgs(batch=len(q_indptr) - 1, indptr=self._keep(q_indptr))
        self._open = self._sealed = None
        if open_list is not None:
            lists = {name: self._keep(tensor) for name, tensor in open_list._asdict().items()}
            self._open = OpenArgs(**lists)
        if sealed_list is not None:
            lists = {name: self._keep(tensor) for name, tensor in sealed_list._asdict().items()}
            self._sealed = SealedArgs(**lists)

    def _keep(self, integers: torch.Tensor) -> int:
        """Address of a list, which lives as long as this object."""
        self._kept.append(integers.to(torch.int32).contiguous())
        return self._kept[-1].data_ptr()

    def run(
        self,
        q: torch.Tensor,
        raw: tuple[torch.Tensor, torch.Tensor] | None,
        tables: SealedTables | None,
        sm_scale: float,
        key_mean: torch.Tensor | None = None,
    ) -> AttentionState:
        """Attention of one layer.

        Args:
            q: [T, Hq, D]; tokens may be strided. Tiers of raw elements have its dtype.
            raw: keys and values [R, 64, H, D], looked at if there are open pages; tiers of raw
                elements have their dtype then.
            tables: looked at if there are sealed pages.
            sm_scale: factor of the scores.
            key_mean: fp32 [H, D], which sealed keys lack; q and the output are then of the model's
                basis (`sealed_basis`), else of the sealed pages'.

        Raises:
            ValueError: a page of new tokens is not listed, or shapes and strides do not fit.
        """
        heads, dim = q.shape[1:]
        kv_heads = _kv_heads(raw, tables)
        if heads % kv_heads or q.stride()[1:] != (dim, 1):
            raise ValueError(f"q {tuple(q.shape)}, strides {q.stride()}, for {kv_heads} KV heads")
        query = self._queries
        query.data, query.token_stride = q.data_ptr(), q.stride(0)
        query.dtype, query.scale = DTYPE_CODES[q.dtype], sm_scale * LOG2_E
        query.kv_heads, query.group, query.dim = kv_heads, heads // kv_heads, dim
        if self._open is not None:
            assert raw is not None
            _point_to_raw(self._open, *raw)
        if self._sealed is not None:
            assert tables is not None
            _point_to_sealed(self._sealed, tables)
            self._sealed.raw_dtype = query.dtype if raw is None else DTYPE_CODES[raw[0].dtype]
            turned = None if key_mean is None else rotate(key_mean).contiguous()
            self._sealed.key_mean = None if turned is None else turned.data_ptr()
        part = AttentionState(
            torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:2], dtype=torch.float32)
        )
        lacking = self._extend(
            ctypes.byref(query),
            None if self._sealed is None else ctypes.byref(self._sealed),
            None if self._open is None else ctypes.byref(self._open),
            part.out.data_ptr(),
            part.lse.data_ptr(),
            threads(),
        )
        if lacking >= 0:
            raise ValueError(f"open pages of sequence {lacking} lack new tokens")
        return part


def _kv_heads(raw: tuple[torch.Tensor, torch.Tensor] | None, tables: SealedTables | None) -> int:
    if raw is not None:
        return raw[0].shape[2]
    assert tables is not None
    return tables.layout.num_kv_heads


def _point_to_raw(args: OpenArgs, k: torch.Tensor, v: torch.Tensor) -> None:
    heads, dim = k.shape[2:]
    inner = heads * dim, dim, 1
    if k.stride()[1:] != inner or k.stride() != v.stride() or k.shape[1] != PAGE_TOKENS:
        raise ValueError(f"raw pages {tuple(k.shape)} with strides {k.stride()}, {v.stride()}")
    args.key, args.value = k.data_ptr(), v.data_ptr()
    args.page_stride, args.dtype = k.stride(0), DTYPE_CODES[k.dtype]


def _point_to_sealed(args: SealedArgs, tables: SealedTables) -> None:
    arena, frames, heads, layout = tables
    args.layout = ctypes.addressof(layout_words(layout))  # cached: it lives on
    args.arena, args.frames, args.heads = (x.data_ptr() for x in (arena, frames, heads))
    args.frames_stride, args.heads_stride = frames.stride(0), heads.stride(0)


def library() -> ctypes.CDLL | None:
    """The compiled kernel for the instruction set in use; None without a compiler."""
    return load_library("extend")
