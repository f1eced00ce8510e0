# SPDX-License-Identifier: Apache-2.0
"""Where attention goes: importance of prompt tokens by layer and KV head, and retention.

Importance is what the papers' policies see when a prompt is whole: mean attention of its last
queries, max over the GQA group (DiffKV, arXiv 2412.03131; XKV, arXiv 2412.05896, sums instead).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.policy.methods.prompt import pooled

QUERIES = 64
"""The last ones of a prompt score the tokens before them (`NUM_TOKENS_SCORE` of DiffKV)."""


@torch.no_grad()
def importances(path: Path, prompts: Iterable[list[int]]) -> list[torch.Tensor]:
    """For each prompt of n tokens float32 [L, H, n - QUERIES]: importance of all but the last."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    return [_importance(model, torch.tensor([ids])) for ids in prompts]


def _importance(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids, output_attentions=True, use_cache=False).attentions
    heads = model.config.num_key_value_heads
    last = torch.stack([a[0, :, -QUERIES:, :-QUERIES] for a in found])  # [L, Hq, Q, n - Q]
    return last.mean(2).unflatten(1, (heads, -1)).amax(2)


def retention(importance: torch.Tensor, share: float) -> torch.Tensor:
    """XKV's R: what the top `share` of the tokens of each head hold of all importance; [..., n]."""
    kept = max(1, round(share * importance.shape[-1]))
    return importance.topk(kept, -1).values.sum(-1) / importance.sum(-1)


def retained_by_snapkv(importance: torch.Tensor, share: float) -> torch.Tensor:
    """What the tokens that policy `snapkv` keeps hold of all importance; [L, H, n] to [L, H]."""
    worth = pooled(importance)
    worth[..., : DiffXKVConfig().sink] = torch.inf
    kept = worth.topk(max(1, round(share * importance.shape[-1])), -1).indices
    return importance.gather(-1, kept).sum(-1) / importance.sum(-1)


def share_needed(importance: torch.Tensor, target: float) -> torch.Tensor:
    """Least share of tokens whose retention is `target`; [..., n] to [...]."""
    ordered = importance.sort(-1, descending=True).values
    reached = ordered.cumsum(-1) >= target * ordered.sum(-1, keepdim=True)
    count = importance.shape[-1] - reached.sum(-1) + 1
    return count / importance.shape[-1]
