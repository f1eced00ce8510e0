# SPDX-License-Identifier: Apache-2.0
"""Importance of a token in one byte: eight steps per doubling, from 2^-31.9 (code 0) to 1 (255)."""

from __future__ import annotations

import torch

STEPS_PER_OCTAVE = 8
TOP = 255


def encode_importance(x: torch.Tensor) -> torch.Tensor:
    """Logarithmic codes of importances.

    Args:
        x: fp32 of any shape, attention weights in [0, 1] (more than 1 saturates).

    Returns:
        uint8 of the same shape: ``round(255 + 8 log2 x)``; 0 for 0, negative values and NaN.
    """
    code = (TOP + STEPS_PER_OCTAVE * x.float().log2()).round()
    return code.nan_to_num(nan=0.0).clamp_(0, TOP).to(torch.uint8)


def decode_importance(code: torch.Tensor) -> torch.Tensor:
    """fp32 importances of `encode_importance` codes (code 0 stands for 2^-31.875 or less)."""
    return ((code.float() - TOP) / STEPS_PER_OCTAVE).exp2()
