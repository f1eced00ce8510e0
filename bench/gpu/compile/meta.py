# SPDX-License-Identifier: Apache-2.0
"""What a decode step launches, on meta tensors: nothing runs."""

from __future__ import annotations

import torch

from bench.gpu.device import kernels
from bench.gpu.shapes import TIERS, Model
from sglang_diffxkv.kernels.decode.work import SequencePages, divide_work
from sglang_diffxkv.kernels.gpu.launch import Launch, recorded
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import LayerPages, SealedTables
from tests.support.layouts import layout_of

LAYERS = 5
"""Slices of layers are aligned differently, which Triton compiles kernels for."""


def decode_launches(model: Model, batch: int, pages: int) -> list[Launch]:
    """Launches of a step of LAYERS layers, ``pages`` pages to a sequence."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    layout = layout_of(*TIERS, head_dim=model.dim, kv_heads=model.kv_heads, itemsize=2)
    total = batch * pages
    lists = ints(total), ints(batch), ints(batch), ints(total), ints(batch)
    raw_shape = LAYERS, 2 * batch, PAGE_TOKENS, model.kv_heads, model.dim
    raw = torch.empty(raw_shape, dtype=torch.bfloat16, device="meta")
    q = raw.new_empty(LAYERS, batch, model.heads, model.dim)
    mean = raw.new_empty(model.kv_heads, model.dim, dtype=torch.float32)
    arena = raw.new_empty(total, layout.frame_bytes, dtype=torch.uint8)
    frames, heads = ints(LAYERS, total, layout.max_frames), ints(LAYERS, total, model.kv_heads, 2)
    with recorded() as launches:
        work = divide_work(SequencePages(*lists), heads, layout)
        for i in range(LAYERS):
            tables = SealedTables(arena, frames[i], heads[i], layout)
            mine = LayerPages(tables, raw[i], raw[i], mean)
            kernels("decode").attend(q[i], q[i], mine, work.layer(i), 1.0)
    return launches
