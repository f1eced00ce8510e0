# SPDX-License-Identifier: Apache-2.0
"""Bytes that attention on a GPU keeps beside the pages, for a budget that holds all of them."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.gpu.device import multiprocessors
from sglang_diffxkv.kernels.layout import PageLayout


def attention_bytes(
    layout: PageLayout,
    num_layers: int,
    queries: int,
    batch: int,
    context_pages: int,
    device: torch.device,
    *,
    flashinfer_bytes: int,
) -> int:
    """Of decode steps, and of prefills: what sealed prefixes are unpacked to, and FlashInfer's.

    Args:
        queries: of a sequence in a decode step: query heads on this rank, times new tokens.
        batch: sequences of the largest decode step.
        context_pages: pages of the longest sequence there can be.
        device: a GPU, or "meta" for one of the size that `multiprocessors` assumes.
        flashinfer_bytes: what that takes, 0 where it does not serve prefill.
    """
    from sglang_diffxkv.kernels.decode.work import KINDS, TILES_PER_SM  # needs Triton
    from sglang_diffxkv.kernels.extend.scratch import scratch_bytes

    segments = batch * layout.num_kv_heads * KINDS
    tiles = TILES_PER_SM * multiprocessors(device) + segments
    row_bytes = 4 * (layout.head_dim + 1)  # an fp32 row of output, and its LSE
    work = num_layers * (16 * tiles + 8 * (segments + 4))
    parts = tiles * (queries // layout.num_kv_heads) * row_bytes
    table = 4 * batch * (context_pages + 4)
    decode = work + parts + batch * queries * row_bytes + table
    return decode + scratch_bytes(layout) + flashinfer_bytes
