# SPDX-License-Identifier: Apache-2.0
"""Where the payload of some pages of one layer lies, and which tokens are in it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Payload(NamedTuple):
    """Payload of S pages of one layer.

    Fields:
        arena: uint8 [F, frame_bytes].
        frames: int32 [S, max_frames] rows of the arena.
        heads: int32 [S, H, 2], as `measure` returned them for these tiers.
        tiers: uint8 [S, H, 64] tier codes.
    """

    arena: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    tiers: torch.Tensor
