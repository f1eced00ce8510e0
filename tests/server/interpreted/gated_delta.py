# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule token by token, where SGLang's kernels do not run in Triton's interpreter.

The names are those of SGLang's functions, in ``sglang.kernels.ops.attention.fla``, and so are the
arguments, as far as its backend on GPUs gives them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize, softplus

CHUNK = 64


def step(state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
         decay: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """One token of B sequences: forget, then correct what the state [B, H, V, K] has for ``k``.

    Args:
        q, k: [B, H, K], of unit length; q scaled. v: [B, H, V]. decay, beta: [B, H].

    Returns:
        [B, H, V]; the state is changed in place.
    """
    state *= decay[..., None, None].exp()
    wrong = v - torch.einsum("bhvk,bhk->bhv", state, k)
    state += torch.einsum("bhv,bhk->bhvk", wrong * beta[..., None], k)
    return torch.einsum("bhvk,bhk->bhv", state, q)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Unit vectors [..., H, K], each for its group of value heads."""
    unit = normalize(x.float(), dim=-1, eps=1e-6)
    return unit.repeat_interleave(heads // x.shape[-2], -2)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **settings: Any,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """A prefill: outputs [1, T, H, V], and the states [1, N, H, V, K] before each chunk."""
    heads, bounds = v.shape[2], cu_seqlens.tolist()
    q, k = _heads(q[0], heads) * q.shape[-1] ** -0.5, _heads(k[0], heads)
    out, before = torch.empty(v.shape[1:]), []
    for slot, start, end in zip(initial_state_indices.tolist(), bounds, bounds[1:], strict=False):
        state = initial_state[slot : slot + 1].float()
        for t in range(start, end):
            if (t - start) % CHUNK == 0:
                before.append(state.clone())
            one = slice(t, t + 1)
            out[one] = step(state, q[one], k[one], v[0, one].float(), g[0, one], beta[0, one])
        initial_state[slot] = state[0].to(initial_state.dtype)
    return out[None].to(v.dtype), None, torch.cat(before)[None]


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    **settings: Any,
) -> None:
    """A decode step of B sequences: ``out`` [B, 1, H, V] is written."""
    (_, heads, v_dim, k_dim), slots = initial_state.shape, ssm_state_indices.long()
    qk, v = mixed_qkv.float().tensor_split([mixed_qkv.shape[1] - heads * v_dim], 1)
    q, k = (_heads(x.unflatten(1, (-1, k_dim)), heads) for x in qk.chunk(2, 1))
    decay = -A_log.float().exp() * softplus(a.float() + dt_bias)
    state = initial_state[slots].float()
    new = step(state, q * scale, k, v.unflatten(1, (heads, v_dim)), decay, b.float().sigmoid())
    initial_state[slots] = state.to(initial_state.dtype)
    out[:, 0] = new.to(out.dtype)
