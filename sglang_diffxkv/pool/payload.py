# SPDX-License-Identifier: Apache-2.0
"""Graded tokens of one layer, on their way into frames: when pages are sealed, or demoted."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import to_sealed_keys
from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.kernels.pack import pack
from sglang_diffxkv.pool.raw_pages import RawPages


class GradedTokens(NamedTuple):
    """Tokens of one layer, and what becomes of those of S pages.

    Attributes:
        keys, values: [R, 64, H, D], as sealed pages hold them (`PageLayout.rotates`).
        tiers: uint8 [S, H, 64]. codes: uint8 [S, H, 64], ``kernels.pack.encode_importance``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tiers: torch.Tensor
    codes: torch.Tensor


class SealableRows(NamedTuple):
    """Keys and values [R, 64, H, D] as sealed pages hold them; rows: int64 [S], which R to take."""

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor


def rows_to_seal(
    raw: RawPages, layout: PageLayout, layer: int, slots: torch.Tensor, key_mean: torch.Tensor
) -> SealableRows:
    """The raw pages at ``slots`` (int64 [S]) of one layer, in the basis of sealed pages.

    Args:
        key_mean: fp32 [H, D], of this layer, looked at where pages rotate.
    """
    keys, values = raw.keys[layer], raw.values[layer]
    if not layout.rotates:
        return SealableRows(keys, values, slots)
    rows = torch.arange(len(slots), device=slots.device)
    sealed_keys = to_sealed_keys(keys[slots], key_mean)
    return SealableRows(sealed_keys, rotate(values[slots].float()), rows)


def write_payload(
    tokens: GradedTokens,
    rows: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    arena: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Write the payload of S pages of one layer into ``frames`` (int32 [S, max_frames]).

    Args:
        rows: int64 [S], which page of ``tokens.keys`` and ``values`` each is.
        heads: int32 [S, H, 2], from ``kernels.layout.measure``.
        arena: uint8 [F, frame_bytes], written.
    """
    pack(
        tokens.keys,
        tokens.values,
        rows,
        tokens.tiers.contiguous(),
        tokens.codes.contiguous(),
        frames.contiguous(),
        heads.contiguous(),
        arena,
        layout,
    )
