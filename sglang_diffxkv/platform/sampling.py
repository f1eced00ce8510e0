# SPDX-License-Identifier: Apache-2.0
"""Sampling while drafts are verified, in torch: for chains, where the target alone decides.

Beside it what SGLang asks FlashInfer for: distributions renormalised to their most likely tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.platform.chains import Accepted, accept


def top_k_renorm(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """Each row of ``probs`` [R, V] with its ``top_ks`` [R] largest entries alone, adding up to 1.

    Entries that equal the smallest of them stay, too.
    """
    last = top_ks.long().clamp(1, probs.shape[1]) - 1
    least = probs.sort(dim=1, descending=True).values.gather(1, last[:, None])
    return _renormalised(probs, probs >= least)


def top_p_renorm(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """Each row of ``probs`` [R, V] with the fewest entries whose sum reaches ``top_ps`` [R]."""
    values, order = probs.sort(dim=1, descending=True)
    before = values.cumsum(1) - values
    kept = torch.zeros_like(probs, dtype=torch.bool)
    kept.scatter_(1, order, (before < top_ps[:, None]) | (before <= 0))
    return _renormalised(probs, kept)


def _renormalised(probs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    kept_probs = probs * kept
    return kept_probs / kept_probs.sum(1, keepdim=True)


class Coins(NamedTuple):
    """Uniform samples in [0, 1): ``drafts`` [B, N], by parent, and ``last`` [B]."""

    drafts: torch.Tensor
    last: torch.Tensor


def sample_chains(
    candidates: torch.Tensor,
    target_probs: torch.Tensor,
    coins: Coins,
    accepted: Accepted,
    thresholds: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Accept each draft with its probability, and sample what follows the last accepted one.

    Tokens are distributed as the target's alone: a draft that was rejected is not sampled in its
    place. Instead of ``tree_speculative_sampling_target_only``.

    Args:
        candidates: [B, N] the last token and the drafts.
        target_probs: [B, N, V] of what follows each node.
        thresholds: drafts as likely as the first are always accepted; probabilities of drafts are
            divided by the second.
    """
    single, divisor = thresholds
    drafts = candidates[:, 1:]
    likely = target_probs[:, :-1].gather(2, drafts[:, :, None])[:, :, 0]
    lucky = coins.drafts[:, :-1] < likely / max(divisor, 1e-9)
    right = (likely > 0) & (lucky | (likely >= single))
    following = candidates.roll(-1, 1)  # of the last accepted node it is sampled below
    count = accept(right, following, accepted)

    batch = torch.arange(len(count))
    rest = target_probs[batch, count].clone()
    rejected = count < drafts.shape[1]
    rest[batch[rejected], drafts[rejected, count[rejected]]] = 0
    sums = rest.cumsum(1)
    sought = coins.last * sums[:, -1]
    # Rounding may leave nothing behind what is sought.
    last = rest.shape[1] - 1 - (rest > 0).flip(1).int().argmax(1)
    sampled = torch.minimum((sums <= sought[:, None]).sum(1), last)
    accepted.tokens.view(candidates.shape)[batch, count] = sampled.to(accepted.tokens.dtype)
