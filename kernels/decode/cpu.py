# SPDX-License-Identifier: Apache-2.0
"""Decode attention in C++ (cpu.cpp)."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels import decode as ops
from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, table_words, threads
from sglang_diffxkv.kernels.cpu.function import CFunction
from sglang_diffxkv.kernels.merge import AttentionState, unwritten_state
from sglang_diffxkv.kernels.pages import OpenPages, SealedPages
from sglang_diffxkv.kernels.softmax import Softmax

_sealed_function = CFunction("decode", "diffxkv_decode_sealed")
_open_function = CFunction("decode", "diffxkv_decode_open")


@ops.decode_sealed.register("cpu")
def decode_sealed(q: torch.Tensor, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    scaled, state = _scaled(q, softmax), unwritten_state(q)
    _sealed_function(
        scaled.data_ptr(),
        q.shape[0],
        q.shape[1] // sealed.layout.num_kv_heads,
        softmax.log2_cap,
        table_words(sealed.tables),
        sealed.indptr.data_ptr(),
        sealed.pages.data_ptr(),
        DTYPE_CODES[q.dtype],
        state.out.data_ptr(),
        state.lse.data_ptr(),
        threads(),
    )
    return state


@ops.decode_open.register("cpu")
def decode_open(
    q: torch.Tensor, opened: OpenPages, last_len: torch.Tensor, softmax: Softmax
) -> AttentionState:
    keys = opened.keys
    kv_heads, dim = keys.shape[2:]
    scaled, state = _scaled(q, softmax), unwritten_state(q)
    _open_function(
        scaled.data_ptr(),
        q.shape[0],
        q.shape[1] // kv_heads,
        kv_heads,
        dim,
        softmax.log2_cap,
        softmax.window_left,
        keys.data_ptr(),
        opened.values.data_ptr(),
        keys.stride(0),
        DTYPE_CODES[keys.dtype],
        opened.indptr.data_ptr(),
        opened.slots.data_ptr(),
        opened.position.data_ptr(),
        last_len.data_ptr(),
        state.out.data_ptr(),
        state.lse.data_ptr(),
        threads(),
    )
    return state


def _scaled(q: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    return (q.float() * softmax.log2_scale).contiguous()
