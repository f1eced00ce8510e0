# SPDX-License-Identifier: Apache-2.0
"""Bytes in terms of 16-bit elements, whatever the dtype that the server was asked in.

KV in fp32 is not what anyone would serve: codes take as many bytes there, but raw elements twice,
so that compression would look twice as good.
"""

from __future__ import annotations

from typing import Any

from sglang_diffxkv.eval.dtype import ITEMSIZE
from sglang_diffxkv.eval.model import Model
from sglang_diffxkv.kernels.layout import FORMATS
from sglang_diffxkv.pool.raw_pages import RawPages


def in_16_bit(stats: dict[str, Any], model: Model) -> dict[str, Any]:
    """`/diffxkv/stats` with the bytes in use and the compression of a 16-bit model."""
    if model.itemsize == ITEMSIZE:
        return stats
    parts = stats["bytes"]
    theirs, ours = (
        RawPages.bytes_per_slot(model.layers, model.kv_heads, model.head_dim, size)
        for size in (model.itemsize, ITEMSIZE)
    )
    rows = sum(
        2 * model.head_dim * stats["tier_tokens"][tier]
        for tier in ("high", "low")
        if FORMATS[stats["tiers"][tier]].is_raw
    )
    payload = parts["payload"] - rows * (model.itemsize - ITEMSIZE)
    slack = parts["slack"] * payload / max(1, parts["payload"])
    before = parts["payload"] + parts["slack"] + parts["metadata"] + parts["raw_pages"]
    after = payload + slack + parts["metadata"] + parts["raw_pages"] * ours / theirs
    # Of everything else the pool takes a share that follows the pages in use.
    in_use = stats["bytes_in_use"] * after / max(1, before)
    dense = stats["tokens_held"] * model.token_bytes
    windows = stats["window_layers"]
    beside = 0 if windows is None else windows["bytes_in_use"] * ITEMSIZE / model.itemsize
    compression = (dense + beside) / max(1, in_use + beside)
    return stats | {"bytes_in_use": round(in_use), "physical_compression": compression}
