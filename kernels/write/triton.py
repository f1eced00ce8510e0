# SPDX-License-Identifier: Apache-2.0
"""One launch for the keys, values and queries of new tokens."""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import write
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.write.triton_kernels import write_kernel

ELEMENTS = 2048
"""Of a token's queries, or keys, that a program turns or copies at a time."""


@write.write_tokens.register("gpu")
def write_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
) -> torch.Tensor:
    tokens, q_heads, dim = q.shape
    size = dim & -dim
    blocks = q_heads * dim // size
    rotated = q.new_empty(q.shape, dtype=torch.float32)
    launch(
        write_kernel,
        (tokens, triton.cdiv(blocks, ELEMENTS // size)),
        q=q,
        k=k,
        v=v,
        rows=rows,
        k_raw=k_raw,
        v_raw=v_raw,
        rotated=rotated,
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        WIDTH=k.shape[1] * dim,
        COLUMNS=min(ELEMENTS, triton.next_power_of_2(k.shape[1] * dim)),
        BLOCKS=blocks,
        SIZE=size,
        ROWS=ELEMENTS // size,
        SCALE=size**-0.5,
        num_warps=4,
    )
    return rotated
