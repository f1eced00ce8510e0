# SPDX-License-Identifier: Apache-2.0
"""Page layouts by the names of their formats."""

from __future__ import annotations

from sglang_diffxkv.kernels.layout import FORMATS, PageLayout, make_layout


def layout_of(
    high: str = "K8V4",
    low: str = "K4V2",
    *,
    head_dim: int = 128,
    kv_heads: int = 2,
    itemsize: int = 4,
) -> PageLayout:
    """A layout with these formats."""
    return make_layout(
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        raw_itemsize=itemsize,
        high=FORMATS[high],
        low=FORMATS[low],
    )
