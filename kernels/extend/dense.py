# SPDX-License-Identifier: Apache-2.0
"""Attention over contiguous tokens with torch's fused CPU kernel, which also returns the LSE."""

from __future__ import annotations

import math

import torch

from sglang_diffxkv.kernels.merge import AttentionState

LOG2_E = math.log2(math.e)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """[L, H, D] of any dtype to contiguous fp32 [H, L, D], which torch's kernel reads fastest."""
    length, h, d = x.shape
    return torch.empty(h, length, d).copy_(x.transpose(0, 1))


def attend_all(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    bias: torch.Tensor | None = None,
) -> AttentionState:
    """Every query attends to every token.

    The queries of a GQA group are folded into one long query sequence of their KV head: K and V
    are read once per group, and short queries still make matrix products of useful height.

    Args:
        q: [T, Hq, D] of any dtype.
        k, v: fp32 [H, L, D].
        sm_scale: factor of the scores.
        bias: fp32 [H, L], added to the scores of each head's tokens, or None.
    """
    t, hq, d = q.shape
    h = k.shape[0]
    folded = q.view(t, h, hq // h, d).permute(1, 2, 0, 3).reshape(1, h, -1, d).to(k.dtype)
    mask = None if bias is None else bias[None, :, None]
    out, lse = _flash(folded, k[None], v[None], sm_scale, causal=False, mask=mask)
    out = out.reshape(h, hq // h, t, d).permute(2, 0, 1, 3).reshape(t, hq, d)
    return AttentionState(out.float(), lse.reshape(hq, t).T * LOG2_E)


def attend_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
) -> AttentionState:
    """Query i attends to tokens 0 ... i; arguments as in `attend_all`, with L = T."""
    queries = q.to(k.dtype).transpose(0, 1)[None]
    out, lse = _flash(queries, k[None], v[None], sm_scale, causal=True, mask=None)
    return AttentionState(out[0].transpose(0, 1).float(), lse[0].T * LOG2_E)


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [1, h, T, D] and natural-log LSE fp32 [1, h, T] of q [1, h, T, D]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=sm_scale
    )
