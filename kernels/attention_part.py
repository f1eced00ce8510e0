# SPDX-License-Identifier: Apache-2.0
"""Attention over one part of a sequence's tokens, ready to be merged with the other parts."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionPart(NamedTuple):
    """Attention of queries over some of their tokens.

    Fields:
        out: fp32 [T, Hq, D], normalised over this part's tokens; 0 where the part is empty.
        lse: fp32 [T, Hq], **base 2** logarithm of the sum of exp(score) (FlashInfer's
            convention); -inf where the part is empty.
    """

    out: torch.Tensor
    lse: torch.Tensor
