# SPDX-License-Identifier: Apache-2.0
"""Raw pages of one layer, on their way into frames."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import to_sealed_keys
from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.kernels.pack import RawTokens
from sglang_diffxkv.pool.raw_pages import RawPages


def tokens_to_seal(
    raw: RawPages, layout: PageLayout, layer: int, slots: torch.Tensor, key_mean: torch.Tensor
) -> RawTokens:
    """The raw pages at ``slots`` (int64 [S]) of one layer, in the basis of sealed pages.

    Args:
        key_mean: fp32 [H, D], of this layer, looked at where pages rotate.
    """
    keys, values = raw.keys[layer], raw.values[layer]
    if not layout.rotates:
        return RawTokens(keys, values, slots)
    rows = torch.arange(len(slots), device=slots.device)
    return RawTokens(to_sealed_keys(keys[slots], key_mean), rotate(values[slots].float()), rows)
