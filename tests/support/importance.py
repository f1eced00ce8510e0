# SPDX-License-Identifier: Apache-2.0
"""Importance models of random weights."""

from __future__ import annotations

import torch

from sglang_diffxkv.policy.importance.features import Rotary, feature_count
from sglang_diffxkv.policy.importance.model import ImportanceModel
from tests.support.policies import Shape

HIDDEN = 5


def random_importance(rotary: Rotary, shape: Shape, hidden: int = HIDDEN) -> ImportanceModel:
    """For a model of this shape, of so many hidden units."""
    heads, inputs = (shape.layers, shape.heads), feature_count(shape.dim, rotary)
    return ImportanceModel(
        rotary,
        weight=0.2 * torch.randn(*heads, inputs, hidden + 1),
        bias=torch.randn(*heads, hidden + 1),
        output=torch.randn(*heads, hidden),
    )
