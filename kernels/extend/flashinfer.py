# SPDX-License-Identifier: Apache-2.0
"""Prefill over open pages with FlashInfer, which reads our raw pages as its own page table."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from sglang_diffxkv.kernels.attention_part import AttentionPart
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends."""


def supports(q: torch.Tensor) -> bool:
    """Whether FlashInfer is installed and has kernels for these queries [T, Hq, D]."""
    fits = q.shape[2] in HEAD_DIMS and q.dtype in DTYPES and len(q) > 0
    return q.device.type == "cuda" and fits and find_spec("flashinfer") is not None


@cache
def wrapper_of(device: torch.device) -> BatchPrefillWithPagedKVCacheWrapper:
    """One wrapper per device: it is planned anew for each step, and run on one stream."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # takes seconds

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")


def plan(
    q: torch.Tensor,
    q_indptr: torch.Tensor,
    k_raw: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
    last_len: torch.Tensor,
    sm_scale: float,
) -> BatchPrefillWithPagedKVCacheWrapper:
    """Make ready for layers with queries and raw pages like these. Waits for the device.

    Causal attention lets the last query see the last listed token: so a sequence's listed pages
    must end with the page of its last new token. Gaps between earlier pages do not matter.

    Args:
        q, q_indptr, k_raw, indptr, slots, sm_scale: as in `open.extend_open`.
        last_len: int32 [B], tokens in each sequence's last listed page, 1 to 64.
    """
    wrapper = wrapper_of(q.device)
    wrapper.plan(
        q_indptr,
        indptr,
        slots,
        last_len,
        q.shape[1],
        k_raw.shape[2],
        q.shape[2],
        PAGE_TOKENS,
        causal=True,
        sm_scale=sm_scale,
        q_data_type=q.dtype,
        kv_data_type=k_raw.dtype,
    )
    return wrapper


def run(
    wrapper: BatchPrefillWithPagedKVCacheWrapper,
    q: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
) -> AttentionPart:
    """Attention of one layer, as planned; the output is rounded to q's dtype in between."""
    out, lse = wrapper.run(q, (k_raw, v_raw), return_lse=True)
    return AttentionPart(out.float(), lse)
