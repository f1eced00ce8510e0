# SPDX-License-Identifier: Apache-2.0
"""Which pages the new tokens of a step attend to, and where they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PageList(NamedTuple):
    """Sealed pages of each of B sequences: int32 [B + 1], into int32 [N]."""

    indptr: torch.Tensor
    pages: torch.Tensor


class OpenList(NamedTuple):
    """Open pages of each of B sequences, and where its new tokens start; as in `extend_open`."""

    q_position: torch.Tensor
    indptr: torch.Tensor
    slots: torch.Tensor
    page_position: torch.Tensor
