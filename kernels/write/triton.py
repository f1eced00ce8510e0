# SPDX-License-Identifier: Apache-2.0
"""One launch for the keys, values and queries of new tokens."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import write
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.write import NewQKV
from sglang_diffxkv.kernels.write.triton_kernels import Token, TokenView, write_kernel

ELEMENTS = 2048
"""Of a token's queries, or keys, that a program turns or copies at a time."""


@write.write_tokens.register("gpu")
def write_tokens(new: NewQKV, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    q, k, v, rows = new
    tokens, q_heads, dim = q.shape
    size = dim & -dim
    token = Token(k.shape[1] * dim, q_heads * dim // size, size, ELEMENTS)
    rotated = q.new_empty(q.shape, dtype=torch.float32)
    launch(
        write_kernel,
        (tokens, triton.cdiv(token.blocks, ELEMENTS // size)),
        tokens=TokenView(q, k, v, q.stride(0), k.stride(0), v.stride(0)),
        rows=rows,
        k_raw=keys,
        v_raw=values,
        rotated=rotated,
        TOKEN=token,
        num_warps=4,
    )
    return rotated
