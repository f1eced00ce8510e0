# SPDX-License-Identifier: Apache-2.0
"""Bytes that attention on a GPU keeps beside the pages, for a budget that holds all of them."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from sglang_diffxkv.kernels.gpu.device import multiprocessors
from sglang_diffxkv.kernels.layout import PageLayout


def attention_bytes(
    layout: PageLayout,
    num_layers: int,
    q_heads: int,
    batch: int,
    context_pages: int,
    device: torch.device,
) -> int:
    """Of decode steps, and of FlashInfer's prefills where that is installed.

    Args:
        q_heads: query heads on this rank. batch: sequences of the largest decode step.
        context_pages: pages of the longest sequence there can be.
        device: a GPU, or "meta" for one of the size that `multiprocessors` assumes.
    """
    from sglang_diffxkv.kernels.decode.plan import ITEMS_PER_SM, KINDS  # needs Triton
    from sglang_diffxkv.kernels.extend.flashinfer import WORKSPACE_BYTES

    rows = batch * layout.num_kv_heads * KINDS
    items = ITEMS_PER_SM * multiprocessors(device) + rows
    row_bytes = 4 * (layout.head_dim + 1)  # an fp32 row of output, and its LSE
    plan = num_layers * (16 * items + 8 * (rows + 4))
    parts = items * q_heads // layout.num_kv_heads * row_bytes
    table = 4 * batch * (context_pages + 4)
    flashinfer = WORKSPACE_BYTES if find_spec("flashinfer") else 0
    return plan + parts + batch * q_heads * row_bytes + table + flashinfer
