# SPDX-License-Identifier: Apache-2.0
"""Sealing bytes: measuring pages, packing raw tokens into frames, and reading them back."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout, Payload, head_counts
from sglang_diffxkv.kernels.pack import cpu, torch_ops

__all__ = [
    "Unpacked",
    "copy_rows",
    "pack",
    "unpack",
    "unpack_into",
]


class Unpacked(NamedTuple):
    """Dequantised pages of one layer in storage order: high tokens, then low, then zeros.

    Fields:
        k, v: [N, H, 64, D] of the dtype asked for.
        position: uint8 [N, H, 64], position of each token in its page.
        importance: uint8 [N, H, 64], `importance.encode_importance` codes.
        kept: bool [N, H, 64], whether the row holds a token; all else is 0 where not.
    """

    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor
    importance: torch.Tensor
    kept: torch.Tensor


def pack(
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    slots: torch.Tensor,
    tiers: torch.Tensor,
    importance: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    arena: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Write the payload of S pages of one layer into frames that are already allocated.

    Args:
        k_raw, v_raw: [R, 64, H, D] raw pages, model dtype; the elements of a row are adjacent.
        slots: int32 or int64 [S], raw page of each.
        tiers: uint8 [S, H, 64] tier codes.
        importance: uint8 [S, H, 64], `encode_importance` codes.
        frames: int32 [S, max_frames], frames of each page, enough for `measure`'s nbytes.
        heads: int32 [S, H, 2], as `measure` returned them for these tiers.
        arena: uint8 [F, frame_bytes], written; bytes between sections are left as they are.
        layout: byte layout; a raw tier needs ``raw_itemsize`` to be the model dtype's.
    """
    chosen = _implementation(arena, in_cpp=True)
    chosen.pack(k_raw, v_raw, slots, tiers, importance, frames, heads, arena, layout)


def copy_rows(old: Payload, new: Payload, layout: PageLayout) -> None:
    """Give tokens that have the same tier in both payloads the very codes and scales they had.

    Quantising a row that was read back may round it once more; this undoes that.

    Args:
        old: read only; its arena must not be written by `new`.
        new: packed already, of the same pages; the rows of these tokens are written again.
    """
    _implementation(new.arena, in_cpp=False).copy_rows(old, new, layout)


def unpack_into(
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    pages: torch.Tensor,
    first: torch.Tensor,
    layout: PageLayout,
    raw_dtype: torch.dtype,
    k: torch.Tensor,
    v: torch.Tensor,
    notes: torch.Tensor | None = None,
) -> None:
    """Dequantise N sealed pages of one layer into rows of the caller's choice.

    Args:
        arena: uint8 [F, frame_bytes].
        frames, heads: int32 [V, max_frames] and [V, H, 2], one layer's directory tables.
        pages: int32 or int64 [N] rows of the tables.
        first: int64 [N, H], output row of each (page, head)'s first token; the others follow.
        layout: byte layout.
        raw_dtype: dtype of the elements of raw tiers.
        k, v: contiguous [rows, D] outputs, fp32 for the fast path on CPUs; rows that receive no
            token stay as they are.
        notes: contiguous uint8 [rows, 2] output of (position, importance code), or None.
    """
    chosen = _implementation(arena, in_cpp=k.dtype == torch.float32)
    chosen.unpack_into(arena, frames, heads, pages, first, layout, raw_dtype, k, v, notes)


def unpack(
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    dtype: torch.dtype,
    raw_dtype: torch.dtype,
) -> Unpacked:
    """Dequantise N sealed pages of one layer, 64 rows to a head; arguments as in `unpack_into`.

    Args:
        dtype: dtype of k and v.
    """
    n, h, d = len(pages), layout.num_kv_heads, layout.head_dim
    k, v = arena.new_zeros((2, n * h * PAGE_TOKENS, d), dtype=dtype)
    notes = arena.new_zeros(n * h * PAGE_TOKENS, 2)
    first = torch.arange(0, n * h * PAGE_TOKENS, PAGE_TOKENS, device=arena.device).view(n, h)
    unpack_into(arena, frames, heads, pages, first, layout, raw_dtype, k, v, notes)
    n_high, n_low = head_counts(heads[pages])
    shape = (n, h, PAGE_TOKENS)
    position, importance = notes.view(*shape, 2).unbind(-1)
    kept = torch.arange(PAGE_TOKENS, device=arena.device) < (n_high + n_low)[..., None]
    return Unpacked(k.view(*shape, d), v.view(*shape, d), position, importance, kept)


def _implementation(arena: torch.Tensor, *, in_cpp: bool) -> ModuleType:
    """The module for the arena's device; ``in_cpp``: whether C++ can do what is asked for."""
    if on_gpu(arena):
        from sglang_diffxkv.kernels.pack import triton  # CPU machines may lack it

        return triton
    return cpu if arena.is_cpu and in_cpp else torch_ops
